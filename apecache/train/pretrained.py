"""Complete a recipe with the scale and bias of the image-text model that a fit begins with."""

from apecache.encoders.calibration import read_calibration
from apecache.encoders.spec import EncoderSpec
from apecache.recipes.recipe import Recipe


def with_own_scale(recipe: Recipe, image: EncoderSpec, text: EncoderSpec) -> Recipe:
    """Return the recipe with the temperature and bias of the encoders' own model.

    A model with a bias was trained by the sigmoid loss (SigLIP), another one by InfoNCE (CLIP). A
    recipe with another `init` is returned unchanged.

    Raises:
        EncoderError: the encoders are not both sides of one image-text model.
    """
    if recipe.init != "pretrained":
        return recipe
    calibration = read_calibration(image, text)
    temperature = 1 / calibration.scale
    settings = {
        "kind": "infonce" if calibration.bias is None else "sigmoid",
        "temperature": temperature,
        # The model may have been trained within other bounds.
        "min_temperature": min(recipe.loss.min_temperature, temperature),
        "max_temperature": max(recipe.loss.max_temperature, temperature),
    }
    if calibration.bias is not None:
        settings["bias"] = calibration.bias
    return recipe.model_copy(update={"loss": recipe.loss.model_copy(update=settings)})
