"""Describe the image models of transformers: class, own pooling, leading tokens."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import (
    AutoModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    MetaClip2VisionModel,
    MetaClip2VisionModelWithProjection,
    SiglipVisionModel,
)

from apecache.encoders.encoder import FeatureTap, State, States, pool_tokens
from apecache.encoders.layers import caught, flatten_map
from apecache.encoders.library_types import LibraryModel, ModelConfig
from apecache.encoders.spec import EncoderSpec, Pooling, no_class_token
from apecache.errors import EncoderError

VIT_TYPES = (
    "beit",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "ijepa",
    "vit",
)
CONVOLUTION_TYPES = (
    "bit",
    "efficientnet",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilevit",
    "regnet",
    "resnet",
)
STAGE_TYPES = (
    "convnext",
    "convnextv2",
    "dinov3_convnext",
    "focalnet",
    "hiera",
    "swin",
    "swinv2",
    *CONVOLUTION_TYPES,
)
"""Convolutional and hierarchical models; their pooled output is what their classifiers take."""
PROJECTED_TYPES = {
    "clip": CLIPVisionModelWithProjection,
    "metaclip_2": MetaClip2VisionModelWithProjection,
}
UNPROJECTED_CLASSES = {
    "CLIPVisionModel": CLIPVisionModel,
    "MetaClip2VisionModel": MetaClip2VisionModel,
}
"""Vision towers that were saved without a projection, by the class that config.json names."""
SUPPORTED_TYPES = (*VIT_TYPES, *STAGE_TYPES, "aimv2_vision_model", "siglip", *PROJECTED_TYPES)
MEAN_PATCH_TYPES = ("beit", "data2vec-vision")
FIXED_SIZE_TYPES = ("deit", "hiera", "ijepa", "siglip_vision_model", "swin", "swinv2", "vit")
"""Types that interpolate their positions only when asked to."""


@dataclass(frozen=True, kw_only=True)
class ImageFamily:
    """Describe one image model of transformers."""

    config: ModelConfig
    """Of the image tower alone."""
    factory: Any
    """Class that opens it."""
    own_output: Literal["pooler_output", "image_embeds"] | None
    """Name of the model's own pooled output; None: its default is the CLS token or the mean."""
    has_class: bool
    n_prefix: int
    """Tokens before the first patch: class and register tokens."""
    may_lack: tuple[str, ...]
    """Words in the names of parameters that the files may lack where the own output is unused."""
    interpolates_on_demand: bool
    options: dict[str, Any]
    """Of the class's `from_pretrained` and of its constructor."""

    def has_own_pooling(self, cut: EncoderSpec) -> bool:
        """Tell whether the cut is the model's own pooled output."""
        return cut.pooling == "default" and cut.layer is None and self.own_output is not None


def read_image_family(spec: EncoderSpec, config: ModelConfig) -> ImageFamily:
    """Describe the image tower of a configuration.

    Raises:
        EncoderError: it is no supported image model.
    """
    model_type = config.model_type
    if model_type in (*PROJECTED_TYPES, "clip_vision_model", "metaclip_2_vision_model"):
        return _projected(config)
    if model_type in ("siglip", "siglip_vision_model"):
        vision_config: ModelConfig = getattr(config, "vision_config", config)
        has_head = getattr(vision_config, "vision_use_head", True)
        return _family(
            vision_config,
            factory=SiglipVisionModel,
            own_output="pooler_output" if has_head else None,
            n_class_tokens=0,
        )
    if model_type == "aimv2_vision_model":
        own_output: Any = "pooler_output" if config.use_head else None
        return _family(config, own_output=own_output, n_class_tokens=0)
    if model_type in STAGE_TYPES:
        # DINOv3's ConvNeXt puts its pooled vector before the positions of its map.
        n_class_tokens = 1 if model_type == "dinov3_convnext" else 0
        return _family(config, own_output="pooler_output", n_class_tokens=n_class_tokens)
    if model_type not in VIT_TYPES:
        raise EncoderError(
            f"encoder {spec}: {model_type} is not supported as an image encoder; supported are "
            f"{', '.join(SUPPORTED_TYPES)}; many others are in timm: and open_clip:"
        )
    # A fine-tuned BEiT was trained on the mean patch, with a norm after the mean.
    is_averaged = model_type in MEAN_PATCH_TYPES and config.use_mean_pooling
    return _family(
        config,
        own_output="pooler_output" if is_averaged else None,
        n_class_tokens={"deit": 2, "ijepa": 0}.get(model_type, 1),
        may_lack=("pooler",),
        # The library leaves this one's pooler out unless it is asked for.
        options={"add_pooling_layer": True} if model_type == "data2vec-vision" else {},
    )


def _family(
    config: ModelConfig,
    own_output: Literal["pooler_output", "image_embeds"] | None,
    n_class_tokens: int,
    factory: Any = AutoModel,
    may_lack: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
) -> ImageFamily:
    is_clip = "clip" in config.model_type
    return ImageFamily(
        config=config,
        factory=factory,
        own_output=own_output,
        has_class=n_class_tokens > 0,
        n_prefix=n_class_tokens + int(getattr(config, "num_register_tokens", 0)),
        may_lack=may_lack,
        interpolates_on_demand=is_clip or config.model_type in FIXED_SIZE_TYPES,
        options=options or {},
    )


def _projected(config: ModelConfig) -> ImageFamily:
    """Describe CLIP's image tower: its own output is the projected CLS token.

    A tower that was saved without the projection gives the CLS token after its norm.
    """
    vision_config: ModelConfig = getattr(config, "vision_config", config)
    architectures = list(getattr(config, "architectures", None) or [])
    unprojected = [
        UNPROJECTED_CLASSES[name] for name in architectures if name in UNPROJECTED_CLASSES
    ]
    if unprojected:
        return _family(
            vision_config,
            factory=unprojected[0],
            own_output="pooler_output",
            n_class_tokens=1,
        )
    # The whole model's projection counts; its towers may repeat another one.
    vision_config.projection_dim = config.projection_dim
    whole_type = config.model_type.removesuffix("_vision_model")
    return _family(
        vision_config,
        factory=PROJECTED_TYPES[whole_type],
        own_output="image_embeds",
        n_class_tokens=1,
        may_lack=("visual_projection", "post_layernorm"),
        options={"config": vision_config},
    )


def image_states(module: LibraryModel, spec: EncoderSpec, family: ImageFamily) -> States:
    """Return one forward pass of a loaded model; all cuts of the model share it."""
    is_resized = bool(spec.resolution) and family.interpolates_on_demand
    options = {"interpolate_pos_encoding": True} if is_resized else {}

    def states(inputs: tuple[Tensor, ...], requested: Collection[State]) -> dict[State, Tensor]:
        (pixels,) = inputs
        output, tokens_by_state = caught(
            module,
            spec=spec,
            states=requested,
            run=lambda: module(pixel_values=pixels, **options),
        )
        tokens_by_state["end"] = output.last_hidden_state
        if "own" in requested:
            assert family.own_output is not None
            own_output: Tensor = getattr(output, family.own_output)
            # Convolutional networks keep the height and width of 1.
            tokens_by_state["own"] = own_output.flatten(1)
        return tokens_by_state

    return states


def image_tap(
    states: States,
    cut: EncoderSpec,
    layer: State,
    family: ImageFamily,
) -> tuple[FeatureTap, Pooling]:
    """Return the features of a cut, and their pooling; `default` is the model's own.

    The positions of a feature map count as tokens.

    Raises:
        EncoderError: a CLS token is asked for, and there is none.
    """
    has_own_pooling = family.has_own_pooling(cut)
    pooling = "default" if has_own_pooling else _image_pooling(cut, layer, family)

    def pool(state: Tensor, _: Tensor | None) -> Tensor:
        if has_own_pooling:
            return state
        is_map = state.ndim == 4
        tokens = flatten_map(state) if is_map else state
        n_prefix = 0 if is_map else family.n_prefix
        return pool_tokens(tokens, mask=None, pooling=pooling, n_prefix=n_prefix)

    return FeatureTap(states=states, state="own" if has_own_pooling else layer, pool=pool), pooling


def _image_pooling(spec: EncoderSpec, layer: State, family: ImageFamily) -> Pooling:
    """Return the spec's pooling; the default is CLS, or the mean where there is no CLS token."""
    # Within its stages DINOv3's ConvNeXt has feature maps only.
    is_map = layer != "end" and family.config.model_type in STAGE_TYPES
    has_class = family.has_class and not is_map
    if "cls" in spec.pooling and not has_class:
        raise no_class_token(f"encoder {spec}", "image")
    if spec.pooling != "default":
        return spec.pooling
    return "cls" if has_class else "mean"
