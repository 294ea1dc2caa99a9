"""Build the reference pair of towers, ViT-B/16 and BERT-base, for counts without named encoders."""

import torch

from apecache.encoders.spec import Pooling
from apecache.encoders.tower import Tower, build_tower

REFERENCE_NAMES = ("timm:vit_base_patch16_224", "hf:bert-base-uncased")


def reference_towers(
    image_pooling: Pooling = "default",
    text_pooling: Pooling = "default",
) -> tuple[Tower, Tower]:
    """Build the image and the text tower on the meta device.

    Nothing is downloaded: timm and transformers have these shapes as defaults.
    """
    import timm
    import transformers as hf

    with torch.device("meta"):
        image = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
        text = hf.BertModel(hf.BertConfig(), add_pooling_layer=False)
    image_tower = build_tower(image.eval(), "image", image_pooling)
    text_tower = build_tower(text.eval(), "text", text_pooling, cls_id=0)
    return image_tower, text_tower
