"""Conversations and their media as a model takes them: a Prompt to answer, a Sample to train on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from ivl.config import ModelConfig, TilingConfig
from ivl.errors import DataError, InputError, MediaError, short
from ivl.processing import chat, image, video
from ivl.processing.augment import Augmentation, compress_, corrupt
from ivl.processing.tokenizer import IMAGE_END, PLACEHOLDER, Tokenizer
from ivl.types import IGNORE, Averaging, Conversation, FramesBy, ImageRef, Prompt, Record, Sample, Text, VideoRef
from ivl.utils.budgets import MAX_PIXELS, MAX_PIXELS_PER_REQUEST, MAX_ROW_CHARS


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How a record becomes a sample."""

    max_tiles_per_image: int | None = None
    """Tile budget that the images of a conversation share; None takes the model's."""
    max_tokens: int | None = None
    """Most tokens of the sample; None is no limit."""
    max_total_tiles: int | None = None
    """Most tiles of the sample, video frames included; None is no limit."""
    overflow: Literal["error", "truncate", "cut"] = "error"
    """A larger sample is refused, or each conversation in turn is cut: after its last reply that fits (truncate), or in the
    middle of a reply where every medium of the conversation comes before (cut)."""
    averaging: Averaging = "token"
    """Loss weight of a trained token."""
    augment: Augmentation | None = None
    """Random changes to images and their tiles; video frames are never changed."""
    min_frames: int = 8
    """A video that names no number of frames gets one drawn uniformly from min_frames to max_frames."""
    max_frames: int = 32
    frames: video.FrameMode = "rand"
    """Which frames: one at random of each interval, its middle, evenly spaced ones, or a fixed rate."""
    fps: float = 1.0
    """Frames a second when frames is "fps"."""
    frames_by: FramesBy = "index"
    """Over what the frames of a video are spread, unless it says so itself."""
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
        max_pixels: int = MAX_PIXELS,
        max_pixels_per_request: int = MAX_PIXELS_PER_REQUEST,
        load: image.Opener = image.load_image,
        resize: image.Resizer = image.resize,
    ) -> None:
        """Combine the parts of a processor.

        Args:
            tiling: replaces the model's.
            max_pixels: an image or frame of more pixels is refused before it is decoded.
            max_pixels_per_request: so are the media of one prompt or sample, with every frame that must be decoded for them.
            load: opens images.
            resize: resizes images to tiles; `ivl.cpu.accelerate(processor)` replaces both by faster ones.

        Raises:
            InputError: if the tokenizer's placeholder is not the model's, or the template is unknown.
        """
        self.config = config
        self.max_pixels = max_pixels
        self.max_pixels_per_request = max_pixels_per_request
        self.load = load
        self.resize = resize
        self.tokenizer = tokenizer
        self.tiling = tiling or config.tiling
        if (placeholder := tokenizer.id(PLACEHOLDER)) != config.image_token_id:
            raise InputError(f"the tokenizer's {PLACEHOLDER} has id {placeholder}, the model's is {config.image_token_id}")
        chat.template_of(config.template)
        self.render = partial(
            chat.render,
            tokenizer=tokenizer,
            template=config.template,
            system_message=config.system_message,
            tokens_per_tile=config.tokens_per_tile,
        )

    def prompt(self, conversation: Conversation, *, root: str = "", num_frames: int = 8) -> Prompt:
        """Tokens up to the assistant's next reply, and the tiles they show. A last turn of the assistant is to be continued.

        Args:
            root: folder of relative media paths.
            num_frames: for videos that do not state their number; their frames are evenly spaced.

        Raises:
            InputError: for turns out of order and texts that are too long; MediaError, which is one, for unreadable media.
        """
        if too_long := _check_texts([conversation]):
            raise InputError(too_long)
        reader = _MediaReader(self, SampleOptions(root=root, min_frames=num_frames, max_frames=num_frames, frames="even"))
        media = reader.read(conversation)
        rendered = self.render(conversation, [len(tiles_GSSC) for tiles_GSSC in media], reply=True)
        return Prompt(torch.from_numpy(np.array(rendered.ids, np.int64)), *reader.show(media))

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
        if not record.conversations:
            raise InputError("the record has no conversation")
        if too_long := _check_texts(record.conversations):
            raise DataError(record.source, "too_long", too_long)
        reader = _MediaReader(self, options)
        sequences: list[_Sequence] = []
        for conversation in record.conversations:
            media = reader.read(conversation)
            rendered = self.render(conversation, [len(tiles_GSSC) for tiles_GSSC in media])
            if not any(rendered.trained):
                raise DataError(record.source, "nothing_trained", "no token is trained: the conversation has no reply")
            sequences.append(_Sequence(rendered, media))
        sequences, cut = _fit(record.source, sequences, options, self.tokenizer.id(IMAGE_END))
        tokens: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        for sequence in sequences:
            ids, trained = sequence.rendered.ids, sequence.rendered.trained
            n = sum(trained)
            weight = {"token": 1.0, "sample": 1 / n, "square": n**-0.5}[options.averaging]
            # Labels are shifted once, here: position t predicts token t + 1.
            next_trained = [*trained[1:], False]
            tokens += ids
            labels += [token if on else IGNORE for token, on in zip([*ids[1:], IGNORE], next_trained, strict=True)]
            weights += [weight if on else 0.0 for on in next_trained]
        tiles_GSSC, tile_ids_R = reader.show(_media_of(sequences))
        return Sample(
            tokens_T=torch.tensor(tokens),
            labels_T=torch.tensor(labels),
            weights_T=torch.tensor(weights, dtype=torch.float32),
            seq_lens=tuple(len(sequence.rendered.ids) for sequence in sequences),
            tiles_GSSC=tiles_GSSC,
            tile_ids_R=tile_ids_R,
            id=record.id,
            source=record.source,
            dataset=record.dataset,
            cut=cut,
        )


def _check_texts(conversations: Sequence[Conversation]) -> str:
    """Say that texts are too long to be encoded; empty if they are not.

    Raises:
        InputError: for what is no conversation.
    """
    try:
        messages = [message for conversation in conversations for message in conversation]
        texts = [part.text for message in messages for part in message.content if isinstance(part, Text)]
        size = sum(map(len, texts))
    except (TypeError, AttributeError):
        raise InputError(f"a conversation must be Messages of Text and media, got {short(conversations)}") from None
    return f"{size:,} characters, the limit is {MAX_ROW_CHARS:,}" if size > MAX_ROW_CHARS else ""


@dataclass(frozen=True)
class _Sequence:
    """A rendered conversation and the tiles of each medium that it shows. The same medium is the same tensor."""

    rendered: chat.Rendered
    media: list[torch.Tensor]


def _media_of(sequences: Iterable[_Sequence]) -> list[torch.Tensor]:
    return [tiles_GSSC for sequence in sequences for tiles_GSSC in sequence.media]


def _sizes(sequences: Sequence[_Sequence]) -> tuple[int, int]:
    """Tokens and tiles; a medium counts once, however often it is shown."""
    return sum(len(each.rendered.ids) for each in sequences), sum(len(tiles_GSSC) for tiles_GSSC in set(_media_of(sequences)))


def _fit(source: str, sequences: list[_Sequence], options: SampleOptions, image_end: int) -> tuple[list[_Sequence], str]:
    """Decide what of a sample is kept: the one place where turns are cut. image_end is the token behind a medium.

    Returns:
        The sequences that are kept, and the text of Sample.cut.

    Raises:
        DataError: of the kind too_long, if the sample is larger than the limits and may not be cut, or no reply fits.
    """
    limits = [float("inf") if most is None else most for most in (options.max_tokens, options.max_total_tiles)]

    def fits(*candidates: _Sequence) -> bool:
        return all(size <= most for size, most in zip(_sizes(candidates), limits, strict=True))

    if fits(*sequences):
        return sequences, ""
    sizes = "{} tokens and {} tiles, the limits are {} and {}".format(*_sizes(sequences), *limits)
    remedy = "raise the limits (max_tokens, max_tiles) or lower max_tiles_per_image"
    if options.overflow == "error":
        raise DataError(source, "too_long", f"{sizes}; {remedy}")
    kept: list[_Sequence] = []
    for whole in sequences:
        # Whole, or its longest beginning that ends with a reply and fits. Media have the text's order, so m cuts them alike.
        ids, trained, cuts = whole.rendered.ids, whole.rendered.trained, whole.rendered.cuts
        ends = cuts[::-1]
        room = max(0, (options.max_tokens or len(ids)) - _sizes(kept)[0])
        if options.overflow == "cut" and any(trained[:room]) and image_end not in ids[room:]:
            ends.insert(0, (room, len(whole.media)))
        starts = (_Sequence(chat.Rendered(ids[:n], trained[:n], []), whole.media[:m]) for n, m in ends)
        best = next((start for start in (whole, *starts) if fits(*kept, start)), None)
        if best is not None:
            kept.append(best)
        elif not kept:
            raise DataError(source, "too_long", f"{sizes}, and no reply fits; {remedy}")
    return kept, "{}; cut to {} and {}".format(sizes, *_sizes(kept))


class _MediaReader:
    """Reads the media of one record as tiles; a medium that is shown again is not read again."""

    def __init__(self, processor: Processor, options: SampleOptions) -> None:
        self._processor = processor
        self._options = options
        self._media: dict[object, torch.Tensor] = {}
        self._budget = image.PixelBudget(processor.max_pixels_per_request)

    def read(self, conversation: Conversation) -> list[torch.Tensor]:
        """Tiles of each medium, in order. Each of n images gets max(1, max_tiles // n) tiles, each frame of a video one."""
        refs = [part for message in conversation for part in message.content if not isinstance(part, Text)]
        num_images = sum(isinstance(ref, ImageRef) for ref in refs)
        budget = self._options.max_tiles_per_image or self._processor.tiling.max_tiles
        share = max(1, budget // max(1, num_images))
        media: list[torch.Tensor] = []
        for ref in refs:
            image.check_source(ref)
            if isinstance(ref, VideoRef):
                key = (ref.source, ref.num_frames, ref.clip and tuple(ref.clip), ref.frames_by)
            else:
                key = (ref.source if isinstance(ref.source, str | bytes) else id(ref.source), ref.max_tiles or share)
            if key not in self._media:
                self._media[key] = self._video(ref) if isinstance(ref, VideoRef) else self._image(ref, ref.max_tiles or share)
            media.append(self._media[key])
        return media

    def show(self, media: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """tiles_GSSC and tile_ids_R for placeholder runs that show these media in this order."""
        starts: dict[torch.Tensor, int] = {}  # tensors are keys by identity
        num_tiles = 0
        tile_ids: list[int] = []
        for tiles_GSSC in media:
            if tiles_GSSC not in starts:
                starts[tiles_GSSC] = num_tiles
                num_tiles += len(tiles_GSSC)
            tile_ids += range(starts[tiles_GSSC], starts[tiles_GSSC] + len(tiles_GSSC))
        tile_ids_R = torch.tensor(tile_ids, dtype=torch.int64)
        if len(starts) == 1:  # the usual case: nothing to copy
            return media[0], tile_ids_R
        size = self._processor.tiling.tile_size
        return torch.cat([torch.zeros(0, size, size, 3, dtype=torch.uint8), *starts]), tile_ids_R

    def _image(self, ref: ImageRef, max_tiles: int) -> torch.Tensor:
        processor, augment, generator = self._processor, self._options.augment, self._options.generator
        damage = augment.drawn(generator) if augment and generator else None
        load = processor.load if damage is None else image.load_image
        pixels = self._budget.load(load, ref, self._options.root, processor.max_pixels)
        if damage is not None:
            pixels = corrupt(pixels, *damage)
        tiles_GSSC = image.tile_image(pixels, processor.tiling, max_tiles, resize=processor.resize)
        if augment and generator and (qualities := augment.qualities(len(tiles_GSSC), generator)):
            compress_(tiles_GSSC, qualities)
        return tiles_GSSC

    def _video(self, ref: VideoRef) -> torch.Tensor:
        options, processor = self._options, self._processor
        num_frames = ref.num_frames
        if num_frames is None:
            generator = options.generator
            num_frames = generator.randint(options.min_frames, options.max_frames) if generator else options.max_frames
        over_time = replace(ref, frames_by=options.frames_by) if options.frames_by == "time" else ref
        tiles = video.load_frames(
            over_time, num_frames, mode=options.frames, fps=options.fps, generator=options.generator,
            root=options.root, max_pixels=processor.max_pixels, budget=self._budget,
            use=lambda frame: image.tile_image(frame, processor.tiling, 1, resize=processor.resize),
        )  # fmt: skip
        return torch.cat(tiles)
