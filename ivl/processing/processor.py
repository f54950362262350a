"""Conversations and their media into what a model takes: a Prompt to answer, a Sample to train on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch
from PIL.Image import Image

from ivl.config import ModelConfig, TilingConfig
from ivl.errors import InputError
from ivl.processing import chat, image, video
from ivl.processing.augment import Augmentation, corrupt
from ivl.processing.degrade import jpeg_
from ivl.processing.tokenizer import PLACEHOLDER, Tokenizer
from ivl.types import IGNORE, Conversation, ImageRef, Prompt, Record, Sample, Text, VideoRef

Averaging = Literal["token", "sample", "square"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How a record becomes a sample."""

    max_tiles: int | None = None
    """Tile budget of a conversation's images; None takes the model's."""
    max_tokens: int | None = None
    """Most tokens of the sample; None is no limit."""
    max_total_tiles: int | None = None
    """Most tiles of the sample, video frames included, where max_tiles is what its images share; None is no limit."""
    overflow: Literal["error", "truncate"] = "error"
    """What happens to a larger one: refused, or each conversation in turn cut after the last whole reply that fits."""
    averaging: Averaging = "token"
    """Loss weight of a token in a sequence of n trained tokens: 1, 1/n or 1/sqrt(n) (spec 3.5)."""
    augment: Augmentation | None = None
    """What is done to images and their tiles at random; never to video frames."""
    min_frames: int = 8
    """A video that names no number of frames gets one drawn uniformly from min_frames to max_frames."""
    max_frames: int = 32
    frames: video.Mode = "rand"
    """Which frames: one at random of each interval, its middle, or a fixed rate."""
    fps: float = 1.0
    """Frames a second when frames is "fps"."""
    generator: random.Random | None = None
    """Source of every random choice; needed for augment and for videos with random frames."""
    root: str = ""
    """Folder of relative media paths."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(f"need 1 <= min_frames <= max_frames, got {self.min_frames} and {self.max_frames}")
        if self.augment and self.generator is None:
            raise ValueError("augmentation is random: give a seeded generator")


class Processor:
    """A model's tokenizer, template and tiling."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        tiling: TilingConfig | None = None,
        *,
        max_pixels: int = image.MAX_PIXELS,
    ) -> None:
        """tiling replaces the model's; an image or frame of more than max_pixels is refused before it is decoded.

        Raises InputError if the tokenizer's placeholder is not the model's.
        """
        self.config = config
        self.max_pixels = max_pixels
        self.tokenizer = tokenizer
        self.tiling = tiling or config.tiling
        if (found := tokenizer.id(PLACEHOLDER)) != config.image_token_id:
            raise InputError(f"the tokenizer's {PLACEHOLDER} has id {found}, the model's is {config.image_token_id}")
        chat.template_of(config.template)

    def prompt(self, conversation: Conversation, *, root: str = "", num_frames: int = 8) -> Prompt:
        """Tokens up to the assistant's next reply, and the tiles they show. A last turn of the assistant is to be continued.

        num_frames is for videos that do not say; their frames are evenly spaced (spec 2.4).

        Raises:
            InputError: for unreadable media or turns out of order.
        """
        tiles = _Tiles(self, SampleOptions(root=root, min_frames=num_frames, max_frames=num_frames), training=False)
        rendered = self._render(conversation, tiles, reply=True)
        assert rendered is not None
        return Prompt(torch.tensor(rendered.ids), *tiles.tensors())

    def sample(self, record: Record, *, options: SampleOptions | None = None) -> Sample:
        """What is trained on: every conversation of the record, its tiles shared between them.

        Raises:
            InputError: starting with the record's source, for unreadable media, turns out of order, a sample larger than
                options allow, or a conversation without a trained token.
        """
        options = options or SampleOptions()
        try:
            return self._sample(record, options)
        except InputError as error:
            raise InputError(f"{record.source}: {error}") from error

    def _sample(self, record: Record, options: SampleOptions) -> Sample:
        tiles = _Tiles(self, options, training=True)
        tokens, labels, weights, lens = [], [], [], []
        if not record.conversations:
            raise InputError("the record has no conversation")
        for conversation in record.conversations:
            rendered = self._render(conversation, tiles, reply=False, limit=options, used=len(tokens))
            if rendered is None:
                continue
            n = sum(rendered.trained)
            if n == 0:
                raise InputError("no token is trained: the conversation has no reply")
            weight = {"token": 1.0, "sample": 1 / n, "square": n**-0.5}[options.averaging]
            trained = [*rendered.trained[1:], False]  # shifted once, here: position t predicts token t + 1
            following = [*rendered.ids[1:], IGNORE]
            tokens += rendered.ids
            labels += [token if on else IGNORE for token, on in zip(following, trained, strict=True)]
            weights += [weight if on else 0.0 for on in trained]
            lens.append(len(rendered.ids))
        tiles_GSSC, tile_ids_R = tiles.tensors()
        return Sample(
            tokens_T=torch.tensor(tokens),
            labels_T=torch.tensor(labels),
            weights_T=torch.tensor(weights, dtype=torch.float32),
            seq_lens=tuple(lens),
            tiles_GSSC=tiles_GSSC,
            tile_ids_R=tile_ids_R,
            id=record.id,
            source=record.source,
            dataset=record.dataset,
        )

    def _render(
        self, conversation: Conversation, tiles: _Tiles, *, reply: bool, limit: SampleOptions | None = None, used: int = 0
    ) -> chat.Rendered | None:
        """Renders and shows the tiles. Beyond the limits cuts whole exchanges from the end if that is the policy; None if
        nothing is left, but `used` tokens of earlier conversations are."""
        groups = tiles.read(conversation)
        most = limit.max_tokens if limit else None
        most_tiles = limit.max_total_tiles if limit else None
        kept = conversation
        while True:
            shown = groups[: len(_media(kept))]
            rendered = chat.render(
                kept,
                [len(group.tiles_GSSC) for group in shown],
                self.tokenizer,
                template=self.config.template,
                system_message=self.config.system_message,
                tokens_per_tile=self.config.tokens_per_tile,
                reply=reply,
            )
            num_tokens, num_tiles = used + len(rendered.ids), tiles.num_with(shown)
            if num_tokens <= (most or num_tokens) and num_tiles <= (most_tiles or num_tiles):
                tiles.show(shown)
                return rendered
            kept = _without_last_exchange(kept)
            if limit and limit.overflow == "truncate" and (kept or used):
                if not kept:
                    return None
                continue
            size, bound = (
                (f"{num_tokens} tokens", most) if num_tokens > (most or num_tokens) else (f"{num_tiles} tiles", most_tiles)
            )
            raise InputError(f"{size}, the limit is {bound}; shorten it, lower max_tiles or raise the limit")


def _without_last_exchange(conversation: Conversation) -> Conversation:
    """The conversation up to the reply before its last; empty if there is none."""
    replies = [n for n, message in enumerate(conversation) if message.role == "assistant"]
    earlier = [n for n in replies if n < len(conversation) - 1]
    return conversation[: earlier[-1] + 1] if earlier else ()


def _media(conversation: Conversation) -> list[ImageRef | VideoRef]:
    return [part for message in conversation for part in message.content if not isinstance(part, Text)]


@dataclass
class _Group:
    """The tiles of one medium, and where they begin among the tiles shown."""

    tiles_GSSC: torch.Tensor
    start: int | None = None


class _Tiles:
    """Tiles of one record: equal media are read and cut once, and shown wherever they stand."""

    def __init__(self, processor: Processor, options: SampleOptions, *, training: bool) -> None:
        self._tiling = processor.tiling
        self._max_pixels = processor.max_pixels
        self._options = options
        self._training = training
        self._groups: dict[object, _Group] = {}
        self._num_shown = 0
        self.tile_ids: list[int] = []

    def read(self, conversation: Conversation) -> list[_Group]:
        """The tiles of each medium; n images get max(1, max_tiles // n) tiles each (spec 2.3), frames one."""
        media = _media(conversation)
        num_images = sum(isinstance(ref, ImageRef) for ref in media)
        share = max(1, (self._options.max_tiles or self._tiling.max_tiles) // max(1, num_images))
        return [self._of(ref, (ref.max_tiles or share) if isinstance(ref, ImageRef) else 1) for ref in media]

    def num_with(self, groups: list[_Group]) -> int:
        """Tiles shown if these are too."""
        new = {id(group): len(group.tiles_GSSC) for group in groups if group.start is None}
        return self._num_shown + sum(new.values())

    def show(self, groups: list[_Group]) -> None:
        """The next placeholder runs show these tiles."""
        for group in groups:
            if group.start is None:
                group.start, self._num_shown = self._num_shown, self._num_shown + len(group.tiles_GSSC)
            self.tile_ids += range(group.start, group.start + len(group.tiles_GSSC))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """tiles_GSSC and tile_ids_R."""
        shown = sorted((group.start, n) for n, group in enumerate(self._groups.values()) if group.start is not None)
        groups = list(self._groups.values())
        size = self._tiling.tile_size
        tile_ids_R = torch.tensor(self.tile_ids, dtype=torch.int64)
        if len(shown) == 1:  # the usual case: nothing to copy
            return groups[shown[0][1]].tiles_GSSC, tile_ids_R
        none = torch.zeros(0, size, size, 3, dtype=torch.uint8)
        return torch.cat([none, *(groups[n].tiles_GSSC for _, n in shown)]), tile_ids_R

    def _of(self, ref: ImageRef | VideoRef, budget: int) -> _Group:
        if isinstance(ref, VideoRef):
            key: object = (ref.source, ref.num_frames, ref.clip and tuple(ref.clip))
        else:
            key = (ref.source if isinstance(ref.source, str | bytes) else id(ref.source), budget)
        if key not in self._groups:
            self._groups[key] = _Group(self._cut(ref, budget))
        return self._groups[key]

    def _cut(self, ref: ImageRef | VideoRef, budget: int) -> torch.Tensor:
        options = self._options
        if isinstance(ref, VideoRef):
            return torch.cat([image.tile_image(frame, self._tiling, 1) for frame in self._frames(ref)])
        augment, generator = options.augment, options.generator
        damage = augment.drawn(generator) if augment and generator else None
        if damage is None:
            pixels_YXC = image.load_pixels(ref, options.root, max_pixels=self._max_pixels, reuse=True)
        else:
            pixels_YXC = corrupt(image.load_image(ref, options.root, max_pixels=self._max_pixels), *damage)
        tiles_GSSC = image.tile_image(pixels_YXC, self._tiling, budget)
        if augment and generator and (qualities := augment.qualities(len(tiles_GSSC), generator)):
            jpeg_(tiles_GSSC.numpy(), qualities)
        return tiles_GSSC

    def _frames(self, ref: VideoRef) -> list[Image]:
        o = self._options
        where = {"root": o.root, "max_pixels": self._max_pixels}
        if not self._training:
            return video.load_frames(ref, ref.num_frames or o.max_frames, mode="even", **where)
        num_frames = ref.num_frames
        if num_frames is None:
            num_frames = o.generator.randint(o.min_frames, o.max_frames) if o.generator else o.max_frames
        return video.load_frames(ref, num_frames, mode=o.frames, fps=o.fps, generator=o.generator, **where)
