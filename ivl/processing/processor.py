"""Conversations and their media as a model takes them: a Prompt to answer, a Sample to train on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ivl.config import ModelConfig, TilingConfig
from ivl.errors import DataError, InputError, MediaError
from ivl.processing import chat, image, video
from ivl.processing.augment import Augmentation, compress_, corrupt
from ivl.processing.tokenizer import PLACEHOLDER, Tokenizer
from ivl.types import IGNORE, Conversation, ImageRef, Prompt, Record, Sample, Text, VideoRef

Averaging = Literal["token", "sample", "square"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How a record becomes a sample."""

    max_tiles_per_image: int | None = None
    """Tile budget that the images of a conversation share; None takes the model's."""
    max_tokens: int | None = None
    """Most tokens of the sample; None is no limit."""
    max_total_tiles: int | None = None
    """Most tiles of the sample, video frames included; None is no limit."""
    overflow: Literal["error", "truncate"] = "error"
    """A larger sample is refused, or each conversation in turn is cut after its last reply that fits."""
    averaging: Averaging = "token"
    """Loss weight of a token in a sequence of n trained tokens: 1, 1/n or 1/sqrt(n) (arXiv:2412.05271, section 3.4)."""
    augment: Augmentation | None = None
    """Random changes to images and their tiles; video frames are never changed."""
    min_frames: int = 8
    """A video that names no number of frames gets one drawn uniformly from min_frames to max_frames."""
    max_frames: int = 32
    frames: video.FrameMode = "rand"
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
    """A model's tokenizer, chat template and tiling."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        tiling: TilingConfig | None = None,
        *,
        max_pixels: int = image.MAX_PIXELS,
        resize: image.Resize = image.resize,
    ) -> None:
        """Combine the parts of a processor.

        Args:
            tiling: replaces the model's.
            max_pixels: an image or frame of more pixels is refused before it is decoded.
            resize: resizes images to tiles; `ivl.cpu.accelerate(processor)` puts in a faster one with the same pixels.

        Raises:
            InputError: if the tokenizer's placeholder is not the model's, or the template is unknown.
        """
        self.config = config
        self.max_pixels = max_pixels
        self.resize = resize
        self.tokenizer = tokenizer
        self.tiling = tiling or config.tiling
        self.buffer = image.PixelBuffer()
        if (placeholder := tokenizer.id(PLACEHOLDER)) != config.image_token_id:
            raise InputError(f"the tokenizer's {PLACEHOLDER} has id {placeholder}, the model's is {config.image_token_id}")
        chat.template_of(config.template)

    def prompt(self, conversation: Conversation, *, root: str = "", num_frames: int = 8) -> Prompt:
        """Tokens up to the assistant's next reply, and the tiles they show. A last turn of the assistant is to be continued.

        Args:
            root: folder of relative media paths.
            num_frames: for videos that do not state their number; their frames are evenly spaced.

        Raises:
            InputError: for turns out of order; MediaError, which is one, for unreadable media.
        """
        tiles = _Tiles(self, SampleOptions(root=root, min_frames=num_frames, max_frames=num_frames), training=False)
        media = tiles.read(conversation)
        rendered = self._render(conversation, media, reply=True)
        return Prompt(torch.tensor(rendered.ids), *tiles.show(media))

    def sample(self, record: Record, *, options: SampleOptions | None = None) -> Sample:
        """Tokens, labels and weights of every conversation of the record, and the tiles, which they share.

        Raises:
            DataError: with the record's source and the kind of the fault, for unreadable media, turns out of order, a sample
                larger than the options allow, or a conversation without a trained token.
        """
        try:
            return self._sample(record, options or SampleOptions())
        except DataError:
            raise
        except InputError as error:
            kind = error.kind if isinstance(error, MediaError) else "bad_row"
            raise DataError(record.source, kind, str(error)) from error

    def _sample(self, record: Record, options: SampleOptions) -> Sample:
        tiles = _Tiles(self, options, training=True)
        if not record.conversations:
            raise InputError("the record has no conversation")
        whole: list[_Sequence] = []
        for conversation in record.conversations:
            media = tiles.read(conversation)
            rendered = self._render(conversation, media, reply=False)
            if not any(rendered.trained):
                raise DataError(record.source, "nothing_trained", "no token is trained: the conversation has no reply")
            whole.append(_Sequence(rendered, len(rendered.ids), media))
        kept, cut = _fit(record.source, whole, options)
        tokens: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        for sequence in kept:
            ids, trained = sequence.rendered.ids[: sequence.num_tokens], sequence.rendered.trained[: sequence.num_tokens]
            n = sum(trained)
            weight = {"token": 1.0, "sample": 1 / n, "square": n**-0.5}[options.averaging]
            # Labels are shifted once, here: position t predicts token t + 1.
            next_trained = [*trained[1:], False]
            tokens += ids
            labels += [token if on else IGNORE for token, on in zip([*ids[1:], IGNORE], next_trained, strict=True)]
            weights += [weight if on else 0.0 for on in next_trained]
        tiles_GSSC, tile_ids_R = tiles.show([medium for sequence in kept for medium in sequence.media])
        return Sample(
            tokens_T=torch.tensor(tokens),
            labels_T=torch.tensor(labels),
            weights_T=torch.tensor(weights, dtype=torch.float32),
            seq_lens=tuple(sequence.num_tokens for sequence in kept),
            tiles_GSSC=tiles_GSSC,
            tile_ids_R=tile_ids_R,
            id=record.id,
            source=record.source,
            dataset=record.dataset,
            cut=cut,
        )

    def _render(self, conversation: Conversation, media: Sequence[_MediumTiles], *, reply: bool) -> chat.Rendered:
        return chat.render(
            conversation,
            [len(medium.tiles_GSSC) for medium in media],
            self.tokenizer,
            template=self.config.template,
            system_message=self.config.system_message,
            tokens_per_tile=self.config.tokens_per_tile,
            reply=reply,
        )


@dataclass(frozen=True, eq=False)
class _MediumTiles:
    """The tiles of one image or video. Two are equal only if they are the same object."""

    tiles_GSSC: torch.Tensor


@dataclass(frozen=True)
class _Sequence:
    """A rendered conversation, of which the first num_tokens tokens are kept, and the media shown by these."""

    rendered: chat.Rendered
    num_tokens: int
    media: list[_MediumTiles]


def _fit(source: str, whole: list[_Sequence], options: SampleOptions) -> tuple[list[_Sequence], str]:
    """Decide what of a sample is kept: the one place where turns are cut.

    Returns:
        The sequences that are kept, and the note for Sample.cut.

    Raises:
        DataError: of the kind too_long, if the sample is larger than the limits and may not be cut, or no reply fits.
    """
    most_tokens = options.max_tokens if options.max_tokens is not None else float("inf")
    most_tiles = options.max_total_tiles if options.max_total_tiles is not None else float("inf")
    num_tokens, num_tiles = sum(sequence.num_tokens for sequence in whole), _num_tiles(_media_of(whole))
    if num_tokens <= most_tokens and num_tiles <= most_tiles:
        return whole, ""
    size = f"{num_tokens} tokens and {num_tiles} tiles, the limits are {most_tokens} and {most_tiles}"
    remedy = "raise the limits (max_tokens, max_tiles) or lower max_tiles_per_image"
    if options.overflow == "error":
        raise DataError(source, "too_long", f"{size}; {remedy}")
    kept: list[_Sequence] = []
    for sequence in whole:
        tokens_before, media_before = sum(each.num_tokens for each in kept), _media_of(kept)
        # Each turn was encoded by itself, so the tokens up to a reply are those of the conversation that ends there.
        for num_tokens, num_media in [(sequence.num_tokens, len(sequence.media)), *reversed(sequence.rendered.cuts)]:
            media = sequence.media[:num_media]
            if tokens_before + num_tokens <= most_tokens and _num_tiles([*media_before, *media]) <= most_tiles:
                kept.append(_Sequence(sequence.rendered, num_tokens, media))
                break
        else:
            if not kept:
                raise DataError(source, "too_long", f"{size}, and no reply fits; {remedy}")
    num_tokens = sum(sequence.num_tokens for sequence in kept)
    return kept, f"{size}; cut to {num_tokens} and {_num_tiles(_media_of(kept))}"


def _media_of(sequences: Iterable[_Sequence]) -> list[_MediumTiles]:
    return [medium for sequence in sequences for medium in sequence.media]


def _num_tiles(media: Iterable[_MediumTiles]) -> int:
    """Tiles of the media, each medium counted once however often it is shown."""
    return sum(len(medium.tiles_GSSC) for medium in set(media))


class _Tiles:
    """The tiles of one record: equal media are read and cut once, wherever they are shown."""

    def __init__(self, processor: Processor, options: SampleOptions, *, training: bool) -> None:
        self._processor = processor
        self._options = options
        self._training = training
        self._media: dict[object, _MediumTiles] = {}

    def read(self, conversation: Conversation) -> list[_MediumTiles]:
        """Read the media of a conversation. Each of n images gets max(1, max_tiles // n) tiles, each frame of a video one."""
        refs = [part for message in conversation for part in message.content if not isinstance(part, Text)]
        num_images = sum(isinstance(ref, ImageRef) for ref in refs)
        budget = self._options.max_tiles_per_image or self._processor.tiling.max_tiles
        share = max(1, budget // max(1, num_images))
        return [self._medium(ref, share) for ref in refs]

    def show(self, media: Sequence[_MediumTiles]) -> tuple[torch.Tensor, torch.Tensor]:
        """tiles_GSSC and tile_ids_R for placeholder runs that show these media in this order."""
        starts: dict[_MediumTiles, int] = {}
        num_tiles = 0
        tile_ids: list[int] = []
        for medium in media:
            if medium not in starts:
                starts[medium] = num_tiles
                num_tiles += len(medium.tiles_GSSC)
            tile_ids += range(starts[medium], starts[medium] + len(medium.tiles_GSSC))
        tile_ids_R = torch.tensor(tile_ids, dtype=torch.int64)
        if len(starts) == 1:  # the usual case: nothing to copy
            return media[0].tiles_GSSC, tile_ids_R
        size = self._processor.tiling.tile_size
        none_GSSC = torch.zeros(0, size, size, 3, dtype=torch.uint8)
        return torch.cat([none_GSSC, *(medium.tiles_GSSC for medium in starts)]), tile_ids_R

    def _medium(self, ref: ImageRef | VideoRef, share: int) -> _MediumTiles:
        if isinstance(ref, VideoRef):
            key: object = (ref.source, ref.num_frames, ref.clip and tuple(ref.clip))
            if key not in self._media:
                self._media[key] = _MediumTiles(self._cut_video(ref))
        else:
            budget = ref.max_tiles or share
            key = (ref.source if isinstance(ref.source, str | bytes) else id(ref.source), budget)
            if key not in self._media:
                self._media[key] = _MediumTiles(self._cut_image(ref, budget))
        return self._media[key]

    def _cut_image(self, ref: ImageRef, budget: int) -> torch.Tensor:
        processor, augment, generator = self._processor, self._options.augment, self._options.generator
        where = {"root": self._options.root, "max_pixels": processor.max_pixels}
        damage = augment.drawn(generator) if augment and generator else None
        if damage is None:
            pixels = image.load_pixels(ref, **where, buffer=processor.buffer)
        else:
            pixels = corrupt(image.load_image(ref, **where), *damage)
        tiles_GSSC = image.tile_image(pixels, processor.tiling, budget, resize=processor.resize)
        if augment and generator and (qualities := augment.qualities(len(tiles_GSSC), generator)):
            compress_(tiles_GSSC, qualities)
        return tiles_GSSC

    def _cut_video(self, ref: VideoRef) -> torch.Tensor:
        options, processor = self._options, self._processor
        where = {"root": options.root, "max_pixels": processor.max_pixels}
        if not self._training:
            frames = video.load_frames(ref, ref.num_frames or options.max_frames, mode="even", **where)
        else:
            num_frames = ref.num_frames
            if num_frames is None:
                drawn = options.generator and options.generator.randint(options.min_frames, options.max_frames)
                num_frames = drawn or options.max_frames
            frames = video.load_frames(
                ref, num_frames, mode=options.frames, fps=options.fps, generator=options.generator, **where
            )
        return torch.cat([image.tile_image(frame, processor.tiling, 1, resize=processor.resize) for frame in frames])
