"""Encode by hub id from a local cache, in a process that never reaches a network.

The hub client reads its settings when it is imported, so this is a process of its own.
Usage: python encode_from_hub.py JOBS OUT, with HF_HUB_OFFLINE=1 and HF_HOME set.
"""

import json
import sys
from pathlib import Path

from families import TEXTS, pictures
from safetensors.torch import save_file
from torch import Tensor, stack

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder


def encode(encoder: ImageEncoder | TextEncoder) -> Tensor:
    """Encode the suite's inputs in one batch."""
    if isinstance(encoder, TextEncoder):
        return encoder.encode_ids(encoder.tokenize(TEXTS).ids)
    return encoder.encode(stack([encoder.preprocess(image) for image in pictures()]))


def main(jobs: Path, out: Path) -> None:
    """Write the features of every job, and its fingerprint's digest or its error."""
    features: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for name, job in json.loads(jobs.read_text()).items():
        spec = parse_encoder(job["encoder"], job["modality"])
        load = load_image_encoder if job["modality"] == "image" else load_text_encoder
        try:
            encoder = load(spec, "cpu")
            features[name] = encode(encoder).contiguous()
            digests[name] = encoder.fingerprint.digest
        except Exception as error:
            digests[name] = f"{type(error).__name__}: {error}"
    save_file(features, out / "features.safetensors")
    (out / "digests.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
