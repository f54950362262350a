"""Opens images without the metadata that Pillow would unpack: a megabyte of it can take gigabytes of memory.

Pillow reads every tag of an EXIF block, and each of its 65,535 tags may name the same megabyte. Of JPEG and PNG it gets the
parts that hold the picture alone; the tags of a TIFF are summed first; what says how the camera was held is read here.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ivl.utils.budgets import MAX_FILE_BYTES, MAX_HEADER_PARTS, MAX_METADATA_BYTES, MAX_PARTS, MAX_PIXELS
from ivl.utils.files import not_itself

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
"""What may be opened; the decoders of other formats are never started."""
FOREIGN = {
    rb"\0\0\0\x0cJXL |\xff\x0a": "JPEG XL",
    rb".{4}ftyp(avi[fs]|he[iv][cmsx]|mif1|msf1)": "AVIF or HEIF",
    rb".{128}DICM": "DICOM",
    rb".{4}ftypcrx |II\*\0\x10\0\0\0CR|II[RU]|FUJIFILMCCD-RAW": "the raw file of a camera",
    rb"v/1\x01|#\?(RADIANCE|RGBE)": "a picture of high dynamic range",
    rb"\s*%PDF": "PDF",
    rb"\s*%!|\xc5\xd0\xd3\xc6": "PostScript",
    rb"8BPS": "Photoshop",
    rb"\0\0\x01\0": "an icon",
    rb"(\xef\xbb\xbf)?\s*(<\?xml|<!--|<svg)": "SVG",
    rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI ": "a video",
}
"""What else is taken for an image, by its first bytes."""
DEPTHS = (8, 10, 12, 14, 16)
"""Bits that scanners and cameras use for a pixel."""
ORIENTATION, SUB_IFDS = 0x0112, (0x8769, 0x8825, 0xA005)
"""Tags: how the camera was held; where EXIF, GPS and interoperability tags lie."""
STRIP_PIXELS = 1 << 18
"""Pixels of a strip of rows that is converted at a time."""
_SIZES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8, 0], float)
"""Bytes of a value by its type in a TIFF."""
_EXIF_TEXT, _XMP_TEXT = b"Raw profile type exif", b"XML:com.adobe.xmp"
"""Names of the texts of a PNG that may say how the camera was held."""
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_UPRIGHT = (
    None, None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip


def open_image(stream: IO[bytes], formats: Sequence[str] = FORMATS) -> tuple[Image.Image, int]:
    """Open an image, and do not decode it.

    Returns:
        The image, and its orientation from 1 to 8; 1 is upright.

    Raises:
        Exception: whatever Pillow raises for what it cannot read.
    """
    head = stream.read(8)
    stream.seek(0)
    exif = xmp = b""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        parts, exif, xmp = _png(data) if head[:1] == b"\x89" else _jpeg(data)
        stream = io.BytesIO(b"".join(parts))
    elif head.startswith((b"II", b"MM")):
        _check_tags(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked instead
        image = Image.open(stream, formats=list(formats))
    if image.format == "WEBP":
        exif, xmp = (image.info.get(name) or b"" for name in ("exif", "xmp"))
    return image, orientation_of(exif, xmp)


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image as its orientation says."""
    method = _UPRIGHT[orientation]
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, over white where it is transparent.

    Gray of more than 8 bits is scaled by the least of 8, 10, 12, 14 and 16 bits that holds its values, so a scan of 12 bits in
    a file of 16 keeps its contrast; wider or negative values are scaled by the range that they take, and float gray within 0
    to 1 by that one. What needs wider pixels on the way is converted in strips of rows: a whole image of them would take
    gigabytes, and Pillow would not let other threads run meanwhile.
    """
    image = _deep_colors(image)
    if image.mode == "RGB":
        image.load()
        return image
    gray = image.mode.startswith("I") or image.mode == "F"
    if not gray and image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image.convert("RGB")
    low, high = _gray_range(image) if gray else (0.0, 0.0)
    rgb = Image.new("RGB", image.size)
    for corner, strip in _strips(image):
        rgb.paste(_gray_to_rgb(strip, low, high) if gray else _over_white(strip), corner)
    return rgb


def _deep_colors(image: Image.Image) -> Image.Image:
    """Scale the colors of a PNG or TIFF of 16 bits that hold fewer, as gray is; another image stays.

    Pillow keeps the upper byte of each color, which shows 12 bits nearly black. Read as if the other byte came first, it keeps
    the lower one.
    """
    tiles, stream = (getattr(image, name, None) for name in ("tile", "fp"))
    options = tiles[0][3] if tiles else ""
    raw = options if isinstance(options, str) else str(options[0])
    if image.format not in ("PNG", "TIFF") or not re.fullmatch("RGBA?;16[BLN]", raw) or stream is None:
        return image
    stream.seek(0)
    data = io.BytesIO(stream.read(MAX_FILE_BYTES))
    image.load()
    most = max(high for _, high in image.getextrema()[:3])  # type: ignore[misc]
    if most >= 1 << DEPTHS[-2] - 8:
        return image
    lower = Image.open(data, formats=[image.format])
    other = raw[:-1] + ("L" if raw[-1] == "B" else "B")  # N is this machine's, which is little-endian
    lower.tile = [(*tile[:3], other if isinstance(options, str) else (other, *tile[3][1:])) for tile in lower.tile]  # type: ignore[attr-defined]
    lower.load()
    bits = next(bits for bits in DEPTHS if most < 1 << max(0, bits - 8))
    scaled = Image.new(image.mode, image.size)
    for (corner, upper), (_, under) in zip(_strips(image), _strips(lower), strict=True):
        values = np.asarray(upper).astype(np.uint16) * 256 + np.asarray(under)
        colors = (values * (255 / (2**bits - 1))).round().clip(0, 255).astype(np.uint8)
        colors[..., 3:] = np.asarray(upper)[..., 3:]
        scaled.paste(Image.fromarray(colors), corner)
    return scaled


def _gray_range(image: Image.Image) -> tuple[float, float]:
    """The values that become black and white."""
    least = most = 0.0
    for _, strip in _strips(image):
        values = np.asarray(strip)
        values = values[np.isfinite(values)] if image.mode == "F" else values
        least, most = min(least, values.min(initial=0)), max(most, values.max(initial=0))
    if least < 0:
        return float(least), float(most)
    if image.mode == "F" and most <= 1:
        return 0.0, 1.0
    return 0.0, next((2.0**bits - 1 for bits in DEPTHS if most < 2**bits), float(most))


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int], Image.Image]]:
    """Yield the rows of an image in strips, each with its upper left corner; a row longer than a strip is cut."""
    width = max(1, min(image.width, STRIP_PIXELS))
    rows = STRIP_PIXELS // width
    for top in range(0, image.height, rows):
        for left in range(0, image.width, width):
            yield (left, top), image.crop((left, top, min(left + width, image.width), min(top + rows, image.height)))


def _gray_to_rgb(image: Image.Image, low: float, high: float) -> Image.Image:
    """Scale gray values to 0 to 255; Pillow's own conversion clips them instead."""
    values = np.asarray(image, dtype=np.float64).clip(low, high) - low
    values = np.nan_to_num(values * (255 / (high - low or 1)))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def problem_of(error: Exception, head: bytes, noun: str = "image", *, quote: bool = False) -> str:
    """What is wrong with an image or a video that cannot be read, and the remedy where its first bytes show one.

    Args:
        quote: whether to quote the library's words, which tell of the content: for files of the reader's own.
    """
    if isinstance(error, Image.DecompressionBombError) and (size := re.search(r"\d+", str(error))):
        return f"{int(size[0]):,} pixels, the limit is {MAX_PIXELS:,}; scale it down"
    foreign = next((name for pattern, name in FOREIGN.items() if re.match(pattern, head, re.DOTALL)), "")
    if not head:
        why = "it is empty"
    elif problem := not_itself(head):
        why = f"it is {problem}"
    elif noun == "image" and foreign:
        why = (
            f"it is {foreign}; save it as PNG or JPEG" if foreign != "a video" else "it is a video; name it .mp4, .mkv or .avi"
        )
    elif noun == "video" and head[4:8] == b"ftyp":
        why = "damaged, or cut short before the index at its end; get the file again"
    elif noun == "video" and (head.startswith((b"\xff\xd8\xff", b"\x89PNG")) or head[8:12] == b"WEBP"):
        why = "it is an image; give it as one"
    elif isinstance(error, UnidentifiedImageError):
        why = "unknown format"  # Pillow's own words would print an object with its address
    else:
        why = f"{type(error).__name__}: {error}" if quote else "damaged or cut short"
    return f"not a readable {noun} ({why})"


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation that an EXIF block states, or else an XMP text; 1 if neither does."""
    exif = exif[:MAX_METADATA_BYTES].removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order:
            (at,) = struct.unpack_from(f"{order}I", exif, 4)
            (count,) = struct.unpack_from(f"{order}H", exif, at)
            for entry in range(at + 2, at + 2 + 12 * count, 12):
                tag, kind, number, value = struct.unpack_from(f"{order}HHIH", exif, entry)
                if tag == ORIENTATION:
                    return value if kind == 3 and number == 1 and 1 <= value <= 8 else 1
    except struct.error:  # the block ends before its tags do
        pass
    found = _XMP.search(xmp[:MAX_METADATA_BYTES])
    return int(found[1]) if found else 1


def _jpeg(data: bytes) -> tuple[list[bytes], bytes, bytes]:
    """The segments of a JPEG that hold the picture, its first EXIF block, and its XMP text."""
    parts, exif, xmp, at = [data[:2]], b"", b"", 2
    for _ in range(MAX_PARTS):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker in (0, 0xFF):  # padding
            at += 1
            continue
        end = at + 2 if 0xD0 <= marker <= 0xD9 or marker == 1 else at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # the pixels follow
            return [*parts, data[at:]], exif, xmp
        if marker == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
            exif = exif or data[at + 4 : end]
        elif marker == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", at + 4):
            xmp = xmp or data[at + 4 : end]
        elif marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # JFIF, Adobe's colors, no metadata
            parts.append(data[at:end])
            if len(parts) > MAX_HEADER_PARTS:
                break
        at = end
    raise ValueError("no picture behind its metadata")


def _png(data: bytes) -> tuple[list[bytes], bytes, bytes]:
    """The chunks of a PNG that hold the picture, its EXIF block, and its XMP text."""
    parts, exif, at, num_headers = [data[:8]], b"", 8, 0
    texts: dict[bytes, bytes] = {}
    for _ in range(MAX_PARTS):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if kind == b"tRNS" or kind[:1].isupper():  # the critical ones begin with a capital letter
            parts.append(data[at:end])
            num_headers += kind != b"IDAT"
        elif kind == b"eXIf":
            exif = data[at + 8 : min(end - 4, at + 8 + MAX_METADATA_BYTES)]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            num_headers += 1
            name = data[at + 8 : at + 88].partition(b"\0")[0]  # of up to 79 bytes
            if name in (_EXIF_TEXT, _XMP_TEXT) and name not in texts:  # no other text is unpacked, and none twice
                texts[name] = _png_text(kind, data[at + 8 : min(end - 4, at + 8 + MAX_METADATA_BYTES)])
        at = end
        if at >= len(data) or kind == b"IEND":
            return parts, exif or _raw_profile(texts.get(_EXIF_TEXT, b"")), texts.get(_XMP_TEXT, b"")
        if num_headers > MAX_HEADER_PARTS:
            break
    raise ValueError("more parts than an encoder would write")


def _png_text(kind: bytes, chunk: bytes) -> bytes:
    """The text of a text chunk as far as it is read."""
    rest = chunk.partition(b"\0")[2]
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    elif packed:
        rest = rest[1:]
    try:
        return zlib.decompressobj().decompress(rest, 2 * MAX_METADATA_BYTES) if packed else rest
    except zlib.error:
        return b""


def _raw_profile(text: bytes) -> bytes:
    """The block that ImageMagick writes as hexadecimal digits: a newline, its name, its length, the digits."""
    try:
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    except ValueError:
        return b""


def _check_tags(stream: IO[bytes]) -> None:
    """Refuse a TIFF whose tags name more bytes than it has: they lie over each other, and each is read by itself."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(16)
    order, big = "<" if head[:2] == b"II" else ">", head[2:4] in (b"+\0", b"\0+")
    number, counter = (f"{order}u8", f"{order}u8") if big else (f"{order}u4", f"{order}u2")
    entry = np.dtype([("tag", f"{order}u2"), ("kind", f"{order}u2"), ("count", number), ("value", number)])

    def tags_at(at: int) -> np.ndarray:
        stream.seek(at)
        count = int(np.frombuffer(stream.read(np.dtype(counter).itemsize), counter, 1)[0])
        data = stream.read(min(count, MAX_PARTS) * entry.itemsize)
        return np.frombuffer(data, entry, len(data) // entry.itemsize)

    tags = tags_at(int(np.frombuffer(head, number, 1, 8 if big else 4)[0]))
    parts = [tags, *map(tags_at, np.unique(tags["value"][np.isin(tags["tag"], SUB_IFDS)])[:9].tolist())]
    named = sum(float((part["count"] * _SIZES[np.minimum(part["kind"], len(_SIZES) - 1)]).sum()) for part in parts)
    if named > size + MAX_METADATA_BYTES:
        raise ValueError("its tags name more bytes than it has")
    stream.seek(0)
