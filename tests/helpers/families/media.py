"""Images and sounds as processors hand them on, made by hand of a configuration's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from pkv_hf.bench.model_types.building import TOKENS

Tensors = dict[str, torch.Tensor]


class Draw:
    """Random tensors of one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def tokens(self, count: int) -> list[int]:
        return torch.randint(*TOKENS, (count,), generator=self._generator).tolist()

    def values(self, *shape: int) -> torch.Tensor:
        """In [0, 1), as pixels are."""
        return torch.rand(shape, generator=self._generator)


@dataclass(frozen=True)
class Kind:
    """How a family takes an image or a sound."""

    placeholders: Callable[[Any], list[int]]
    """The tokens that stand for one, by the configuration."""
    tensors: Callable[[Any, Draw, Sequence[int]], Tensors]
    """What goes beside the tokens, by the configuration and how many each row has."""
    types: str = ""
    """The argument that says of what kind each token is; empty where there is none."""
    of_media: int = 1
    """What it says of an image's tokens; it is 0 of others."""


def rows_with_media(kind: Kind, config: PreTrainedConfig, rows: Sequence[tuple[int, int, int]], seed: int) -> Tensors:
    """Rows padded on the left: `(tokens before, images, tokens after)` each."""
    draw, wanted = Draw(seed), kind.placeholders(config)
    special = {token for token in wanted if wanted.count(token) > 1} or set(wanted)
    texts = [[*draw.tokens(before), *wanted * count, *draw.tokens(after)] for before, count, after in rows]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    inputs, counts = {"input_ids": ids, "attention_mask": mask}, [count for _, count, _ in rows]
    if any(counts):
        inputs.update(kind.tensors(config, draw, counts))
    if kind.types:
        inputs[kind.types] = torch.isin(ids, torch.tensor(sorted(special))) * kind.of_media
    return inputs


def side(config: Any) -> int:
    """Of a square image in pixels."""
    size = config.vision_config.image_size
    return size if isinstance(size, int) else size[0]


def patches(config: Any) -> int:
    """Along a side."""
    size = config.vision_config.patch_size
    return side(config) // (size if isinstance(size, int) else size[0])


def pixels(config: Any, draw: Draw, counts: Sequence[int]) -> Tensors:
    return {"pixel_values": draw.values(sum(counts), 3, side(config), side(config))}


def square(token: str, merged: int = 1, around: tuple[str, ...] = ()) -> Callable[[Any], list[int]]:
    """Placeholders of a square image, of which so many patches along a side are one token."""

    def placeholders(config: Any) -> list[int]:
        tokens = [getattr(config, token)] * (patches(config) // merged) ** 2
        begin, end = ([getattr(config, name)] for name in around) if around else ([], [])
        return [*begin, *tokens, *end]

    return placeholders


GRID = (1, 4, 6)
"""Frames, patches down and across: the axes of 3-D positions differ."""


def qwen_placeholders(config: Any) -> list[int]:
    count = GRID[1] * GRID[2] // config.vision_config.spatial_merge_size**2
    return [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]


def glm_placeholders(config: Any) -> list[int]:
    count = GRID[1] * GRID[2] // config.vision_config.spatial_merge_size**2
    return [config.image_start_token_id, *[config.image_token_id] * count, config.image_end_token_id]


def grids(config: Any, draw: Draw, counts: Sequence[int]) -> Tensors:
    vision, images = config.vision_config, sum(counts)
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    flat = draw.values(images * GRID[1] * GRID[2], width)
    return {"pixel_values": flat, "image_grid_thw": torch.tensor([GRID] * images)}


def gemma4_placeholders(config: Any) -> list[int]:
    count = GRID[1] * GRID[2] // config.vision_config.pooling_kernel_size**2
    return [config.boi_token_id, *[config.image_token_id] * count, config.eoi_token_id]


def positioned_patches(config: Any, draw: Draw, counts: Sequence[int]) -> Tensors:
    """Patches and their places, across and down."""
    _, down, across = GRID
    places = torch.tensor([(x, y) for y in range(down) for x in range(across)])
    values = draw.values(sum(counts), down * across, 3 * config.vision_config.patch_size**2)
    return {"pixel_values": values, "image_position_ids": places.repeat(sum(counts), 1, 1)}


def sized(config: Any, draw: Draw, counts: Sequence[int]) -> Tensors:
    return {**pixels(config, draw, counts), "image_sizes": torch.tensor([[side(config)] * 2] * sum(counts))}


def onevision_placeholders(config: Any) -> list[int]:
    """The whole image, and one tile whose rows end with a newline."""
    along = patches(config)
    return [config.image_token_id] * (along**2 + along * (along + 1))


def tiles(config: Any, draw: Draw, counts: Sequence[int]) -> Tensors:
    values = draw.values(sum(counts), 2, 3, side(config), side(config))
    return {"pixel_values": values, "image_sizes": torch.tensor([[side(config)] * 2] * sum(counts))}


def padded_images(config: Any, draw: Draw, counts: Sequence[int]) -> Tensors:
    """Images by row; a row that has fewer is filled with images of zeros, and all have a border that is masked."""
    shape = len(counts), max(counts), side(config), side(config)
    mask = torch.ones(shape, dtype=torch.long)
    mask[..., shape[-1] // patches(config) * (patches(config) - 1) :] = 0
    values = draw.values(shape[0], shape[1], 3, *shape[2:])
    for row, count in enumerate(counts):
        values[row, count:] = 0
    return {"pixel_values": values, "pixel_attention_mask": mask}


def molmo_placeholders(config: Any) -> list[int]:
    return [config.image_start_token_id, *[config.image_token_id] * 4, config.image_end_token_id]


def pooled_crops(config: Any, draw: Draw, counts: Sequence[int]) -> Tensors:
    """One crop of 4 x 4 patches an image; a token pools 2 x 2 of them."""
    images, width = sum(counts), 3 * config.vision_config.patch_size**2
    pools = torch.tensor([[row * 4 + col + i for i in (0, 1, 4, 5)] for row in (0, 2) for col in (0, 2)])
    return {
        "pixel_values": draw.values(images, 16, width),
        "image_token_pooling": torch.cat([pools + 16 * image for image in range(images)]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * images),
        "image_num_crops": torch.ones(images, dtype=torch.long),
    }


FRAMES = 16


def qwen_audio_placeholders(config: Any) -> list[int]:
    return [config.audio_token_id] * (((FRAMES - 1) // 2 + 1 - 2) // 2 + 1)


def masked_features(config: Any, draw: Draw, counts: Sequence[int]) -> Tensors:
    audio = config.audio_config
    longest = 2 * audio.max_source_positions
    mask = torch.zeros(sum(counts), longest, dtype=torch.long)
    mask[:, :FRAMES] = 1
    return {
        "input_features": draw.values(sum(counts), audio.num_mel_bins, longest),
        "feature_attention_mask": mask,
    }


def voxtral_placeholders(config: Any) -> list[int]:
    audio = config.audio_config
    return [config.audio_token_id] * (audio.max_source_positions * audio.hidden_size // audio.intermediate_size)


def features(config: Any, draw: Draw, counts: Sequence[int]) -> Tensors:
    audio = config.audio_config
    return {"input_features": draw.values(sum(counts), audio.num_mel_bins, 2 * audio.max_source_positions)}


QWEN = Kind(qwen_placeholders, grids, "mm_token_type_ids")
LLAVA = Kind(square("image_token_id"), pixels)
MISTRAL = Kind(square("image_token_id", merged=2), sized)
IDEFICS = Kind(square("image_token_id", merged=2), padded_images)

KINDS = {
    "qwen2.5-vl": QWEN,
    "qwen3-vl": QWEN,
    "qwen3-vl-moe": QWEN,
    "qwen3.5-vl": QWEN,
    "glm4v": Kind(glm_placeholders, grids, "mm_token_type_ids"),
    "gemma3": Kind(square("image_token_id", 2, ("boi_token_index", "eoi_token_index")), pixels, "token_type_ids"),
    "gemma4": Kind(gemma4_placeholders, positioned_patches, "mm_token_type_ids"),
    "mistral3": MISTRAL,
    "ministral3": MISTRAL,
    "internvl": Kind(square("image_token_id", merged=2), pixels),
    "llava": LLAVA,
    "llava-onevision": Kind(onevision_placeholders, tiles),
    "molmo2": Kind(molmo_placeholders, pooled_crops, "mm_token_type_ids"),
    "paligemma": Kind(square("image_token_id"), pixels, "token_type_ids", of_media=0),
    "smolvlm": IDEFICS,
    "idefics3": IDEFICS,
    "qwen2-audio": Kind(qwen_audio_placeholders, masked_features),
    "voxtral": Kind(voxtral_placeholders, features),
}
"""By the family's name in `models`."""
