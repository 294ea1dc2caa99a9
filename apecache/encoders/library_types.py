"""Name the objects of encoder libraries whose attributes have no types.

Their classes differ by library and version, and what is read of them is set in their constructors.
"""

from typing import Any, TypeAlias

LibraryModel: TypeAlias = Any
"""A model of timm, transformers, open_clip or sentence-transformers: a `torch.nn.Module`."""
ModelConfig: TypeAlias = Any
"""A `PretrainedConfig` of transformers."""
Tokenizer: TypeAlias = Any
"""A tokenizer of transformers or open_clip."""
Processor: TypeAlias = Any
"""An image processor of transformers."""
