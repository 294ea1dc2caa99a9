"""The 38 tasks of the DataComp challenge: folder, name and main metric."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataCompTask:
    """Name one task of DataComp (Gadre et al. 2023, appendix N)."""

    name: str
    main_metric: str = "acc1"
    """What counts in the mean of all tasks; `mean_recall@1` is the mean of both directions."""


DATACOMP = {
    "vtab/caltech101": DataCompTask(name="Caltech-101", main_metric="mean_per_class_recall"),
    "cifar10": DataCompTask(name="CIFAR-10"),
    "vtab/cifar100": DataCompTask(name="CIFAR-100"),
    "vtab/clevr_count_all": DataCompTask(name="CLEVR Counts"),
    "vtab/clevr_closest_object_distance": DataCompTask(name="CLEVR Distance"),
    "country211": DataCompTask(name="Country211"),
    "vtab/dtd": DataCompTask(name="Describable Textures"),
    "vtab/eurosat": DataCompTask(name="EuroSAT"),
    "fgvc_aircraft": DataCompTask(name="FGVC Aircraft", main_metric="mean_per_class_recall"),
    "food101": DataCompTask(name="Food-101"),
    "gtsrb": DataCompTask(name="GTSRB"),
    "imagenet1k": DataCompTask(name="ImageNet 1k"),
    "imagenet_sketch": DataCompTask(name="ImageNet Sketch"),
    "imagenetv2": DataCompTask(name="ImageNet v2"),
    "imagenet-a": DataCompTask(name="ImageNet-A"),
    "imagenet-o": DataCompTask(name="ImageNet-O"),
    "imagenet-r": DataCompTask(name="ImageNet-R"),
    "vtab/kitti_closest_vehicle_distance": DataCompTask(name="KITTI Vehicle Distance"),
    "mnist": DataCompTask(name="MNIST"),
    "objectnet": DataCompTask(name="ObjectNet"),
    "vtab/flowers": DataCompTask(name="Oxford Flowers-102", main_metric="mean_per_class_recall"),
    "vtab/pets": DataCompTask(name="Oxford-IIIT Pet", main_metric="mean_per_class_recall"),
    "voc2007": DataCompTask(name="Pascal VOC 2007"),
    "vtab/pcam": DataCompTask(name="PatchCamelyon"),
    "renderedsst2": DataCompTask(name="Rendered SST2"),
    "vtab/resisc45": DataCompTask(name="RESISC45"),
    "cars": DataCompTask(name="Stanford Cars"),
    "stl10": DataCompTask(name="STL-10"),
    "sun397": DataCompTask(name="SUN397"),
    "vtab/svhn": DataCompTask(name="SVHN"),
    "retrieval/flickr30k": DataCompTask(name="Flickr", main_metric="mean_recall@1"),
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": DataCompTask(
        name="MSCOCO",
        main_metric="mean_recall@1",
    ),
    "misc/winogavil": DataCompTask(name="WinoGAViL", main_metric="jaccard_score_10-12"),
    "wilds/iwildcam": DataCompTask(name="iWildCam", main_metric="F1-macro_all"),
    "wilds/camelyon17": DataCompTask(name="Camelyon17"),
    "wilds/fmow": DataCompTask(name="FMoW", main_metric="acc_worst_region"),
    "fairness/dollar_street": DataCompTask(name="Dollar Street", main_metric="acc_top5_wg"),
    "fairness/geode": DataCompTask(name="GeoDE", main_metric="acc_wg"),
}
"""The 38 tasks by the folder of their data, with the names and main metrics of the challenge."""
OURS = ("acc1", "mean_per_class_recall", "mean_recall@1")
"""Main metrics that clip_benchmark computes; the others need code of the challenge."""
