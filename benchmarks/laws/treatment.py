"""How strong a treatment was: how far the CLS vectors of L4's arms could move at most.

    python -m benchmarks.laws.treatment --image hf:FOLDER --text hf:FOLDER --steps 80 --lr 1e-4

AdamW moves a value by at most about the learning rate in a step, so the sum of the rates bounds the
change of every value. It is compared with the root mean square of the CLS vectors' values.
"""

import argparse

import torch

from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder
from apecache.encoders.tower import tower_of
from apecache.recipes.recipe import load_recipe
from apecache.train.optim import learning_rate_factor
from benchmarks.record import print_table


def main() -> None:
    options = parse_arguments()
    reach = sum_of_rates(options.recipe, options.steps, options.lr)
    rows = []
    for side, name, load in (
        ("image", options.image, load_image_encoder),
        ("text", options.text, load_text_encoder),
    ):
        encoder = load(parse_encoder(name, side), "cpu")
        tower = tower_of(encoder)
        for part in tower.parts():
            if part.section == "cls":
                values = tower.parameter(part).detach()
                # A token table and its CLS row are one parameter until they are split.
                row = values[tower.cls_id] if part.name.endswith("[cls]") else values
                size = float(row.square().mean().sqrt())
                rows.append(
                    {
                        "side": side,
                        "parameter": part.name,
                        "root mean square": round(size, 4),
                        "largest change": round(reach, 5),
                        "of that, per cent": round(100 * reach / size, 1),
                    }
                )
    print_table(rows)


def sum_of_rates(name: str, steps: int, lr: float | None) -> float:
    recipe = load_recipe(name)
    rate = recipe.optimizer.lr if lr is None else lr
    return sum(rate * learning_rate_factor(step, steps, recipe.schedule) for step in range(steps))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How far CLS vectors can move.")
    parser.add_argument("--image", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--recipe", default="freeze/Vcf-Tcu")
    parser.add_argument("--steps", type=int, default=3125)
    parser.add_argument("--lr", type=float)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
