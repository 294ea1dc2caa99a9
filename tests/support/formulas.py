"""Layers, towers, losses and optimizers by their formulas, on weights by name.

Written from the publications. Tests compare values and gradients of the library with them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
VIT_EPS = 1e-6
BERT_EPS = 1e-12


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return centered / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(q k / sqrt(width of a head)) v for each head, side by side; [n, length, dim]."""
    width = query.shape[-1] // n_heads
    heads = []
    for head in range(n_heads):
        own = slice(head * width, (head + 1) * width)
        scores = query[..., own] @ key[..., own].transpose(1, 2) / math.sqrt(width)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, -torch.inf)
        heads.append(scores.softmax(-1) @ value[..., own])
    return torch.cat(heads, -1)


# --- towers ---------------------------------------------------------------------------------------


def adapter(x: Tensor, weights: Weights, name: str) -> Tensor:
    """LilT's bottleneck with its residual; without weights of that name, x."""
    if f"{name}.down.weight" not in weights:
        return x
    return x + linear(gelu(linear(x, weights, f"{name}.down")), weights, f"{name}.up")


def vit_embeddings(pixels: Tensor, weights: Weights, name: str) -> Tensor:
    """Patches [n, 3, side, side] -> one linear map of each, CLS before them, plus positions."""
    kernel = weights[f"{name}.patch_embed.proj.weight"]
    side = kernel.shape[-1]
    patches = pixels.unfold(2, side, side).unfold(3, side, side)
    flat = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = flat @ kernel.flatten(1).T + weights[f"{name}.patch_embed.proj.bias"]
    cls = weights[f"{name}.cls_token"].expand(len(tokens), -1, -1)
    return torch.cat([cls, tokens], 1) + weights[f"{name}.pos_embed"]


def vit_block(x: Tensor, weights: Weights, name: str, adapters: str = "") -> Tensor:
    """Pre-norm attention and feed-forward of two heads; adapters stand before the norms."""
    normed = layer_norm(adapter(x, weights, f"{adapters}.0"), weights, f"{name}.norm1", VIT_EPS)
    query, key, value = linear(normed, weights, f"{name}.attn.qkv").chunk(3, -1)
    x = x + linear(attend(query, key, value, 2), weights, f"{name}.attn.proj")
    normed = layer_norm(adapter(x, weights, f"{adapters}.1"), weights, f"{name}.norm2", VIT_EPS)
    inner = gelu(linear(normed, weights, f"{name}.mlp.fc1"))
    return x + linear(inner, weights, f"{name}.mlp.fc2")


def vit_cls(pixels: Tensor, weights: Weights, side: str = "image.tower") -> Tensor:
    """The CLS of `small_vit` after its final norm, [n, 16], with LilT's adapters if there are."""
    x = vit_embeddings(pixels, weights, f"{side}.module")
    for block in range(3):
        adapters = f"{side}.adapters.layerwise.{block}"
        x = vit_block(x, weights, f"{side}.module.blocks.{block}", adapters)
    if f"{side}.adapters.deep.norm1.weight" in weights:
        x = vit_block(x, weights, f"{side}.adapters.deep")
    return layer_norm(x, weights, f"{side}.module.norm", VIT_EPS)[:, 0]


def bert_embeddings(ids: Tensor, weights: Weights, name: str, cls_id: int = 2) -> Tensor:
    """Words, positions and the first token type, normalized."""
    table = weights[f"{name}.word_embeddings.weight"]
    row = weights.get(f"{name}.word_embeddings.row")
    if row is not None:
        table = torch.cat([table[:cls_id], row.unsqueeze(0), table[cls_id + 1 :]])
    positions = weights[f"{name}.position_embeddings.weight"][: ids.shape[1]]
    types = weights[f"{name}.token_type_embeddings.weight"][0]
    return layer_norm(table[ids] + positions + types, weights, f"{name}.LayerNorm", BERT_EPS)


def bert_layer(x: Tensor, mask: Tensor, weights: Weights, name: str, adapters: str = "") -> Tensor:
    """Post-norm attention and feed-forward of two heads; adapters stand after the dense layers."""
    attention = f"{name}.attention"
    attended = attend(
        linear(x, weights, f"{attention}.self.query"),
        key=linear(x, weights, f"{attention}.self.key"),
        value=linear(x, weights, f"{attention}.self.value"),
        n_heads=2,
        mask=mask,
    )
    dense = linear(attended, weights, f"{attention}.output.dense")
    branch = adapter(dense, weights, f"{adapters}.0")
    x = layer_norm(branch + x, weights, f"{attention}.output.LayerNorm", BERT_EPS)
    inner = gelu(linear(x, weights, f"{name}.intermediate.dense"))
    dense = linear(inner, weights, f"{name}.output.dense")
    branch = adapter(dense, weights, f"{adapters}.1")
    return layer_norm(branch + x, weights, f"{name}.output.LayerNorm", BERT_EPS)


def bert_cls(ids: Tensor, mask: Tensor, weights: Weights, side: str = "text.tower") -> Tensor:
    """The raw CLS of `small_bert`, [n, 16], with LilT's adapters if there are."""
    x = bert_embeddings(ids, weights, f"{side}.module.embeddings")
    for layer in range(3):
        adapters = f"{side}.adapters.layerwise.{layer}"
        x = bert_layer(x, mask, weights, f"{side}.module.encoder.layer.{layer}", adapters)
    if f"{side}.adapters.deep.output.dense.weight" in weights:
        x = bert_layer(x, mask, weights, f"{side}.adapters.deep")
    return x[:, 0]


# --- losses and updates ---------------------------------------------------------------------------


def cross_entropy(logits: Tensor) -> Tensor:
    """Mean of -log softmax at the diagonal: column i is the right answer of row i."""
    log_shares = logits - logits.exp().sum(1, keepdim=True).log()
    return -log_shares.diagonal().mean()


def contrastive(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Both directions of the cross-entropy of cosines times `scale`, averaged."""
    logits = scale * unit(image) @ unit(text).T
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019)."""

    lr: Callable[[int], float]
    """Learning rate of each step, counted from 0."""
    betas: tuple[float, float]
    eps: float

    def moved(
        self,
        start: Tensor,
        gradients: list[Tensor],
        decay: float,
        first_step: int,
    ) -> Tensor:
        """The parameter after these gradients, one for each step; moments begin at 0."""
        weight = start
        first = torch.zeros_like(weight)
        second = torch.zeros_like(weight)
        for step, gradient in enumerate(gradients):
            lr = self.lr(first_step + step)
            first = self.betas[0] * first + (1 - self.betas[0]) * gradient
            second = self.betas[1] * second + (1 - self.betas[1]) * gradient.double().square()
            first_mean = first / (1 - self.betas[0] ** (step + 1))
            second_mean = second / (1 - self.betas[1] ** (step + 1))
            weight = weight * (1 - lr * decay)
            weight = weight - lr * first_mean / (second_mean.sqrt() + self.eps)
        return weight


def warm_cosine(peak: float, n_warmup: int, n_steps: int) -> list[float]:
    """Rates that rise linearly to the peak in `n_warmup` steps and fall to 0 along a cosine."""
    found = []
    for step in range(n_steps):
        if step < n_warmup:
            found.append(peak * (step + 1) / n_warmup)
        else:
            progress = (step - n_warmup) / (n_steps - n_warmup)
            found.append(peak * 0.5 * (1 + math.cos(math.pi * progress)))
    return found


def lilt_rates(per_epoch: int) -> list[float]:
    """The published loop: a scheduler is stepped after iterations 0, 100, …, 1,000 of the first
    epoch with 0, 1, …, 10, and before every later epoch e with 10 + e."""

    def scheduled(t: int) -> float:
        if t < 10:
            return 1e-5 + t * (1e-4 - 1e-5) / 10
        return 1e-5 + 0.5 * (1e-4 - 1e-5) * (1 + math.cos(math.pi * (t - 10) / 15))

    rate = 1e-5
    found = []
    for epoch in range(15):
        if epoch:
            rate = scheduled(epoch + 10)
        for iteration in range(per_epoch):
            found.append(rate)
            if epoch == 0 and iteration % 100 == 0 and iteration <= 1000:
                rate = scheduled(iteration // 100)
    return found
