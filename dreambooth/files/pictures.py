"""Pictures as files: PNG with the settings of the picture, and contact sheets. The settings also mark a
picture as one that this program wrote: it is never taken for a photo."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dreambooth.io import reader
from dreambooth.io.errors import UserError

THUMBNAIL = 160  # longer side of a picture on a contact sheet, in pixels
_KEYWORD = "dreambooth"  # of the text chunk
_LAST_TEXT = 2**22  # bytes within which the text begins: a file may have millions of chunks
_DAMAGED = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # Pillow's errors of bad files
_LABEL_HEIGHT, _HEADING_HEIGHT, _MARGIN = 20, 22, 6  # pixels


def png(image: Image.Image, settings: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a PNG file. `settings` are stored as JSON in one text chunk, `dreambooth`: see
    `is_marked`. With a chunk for each setting, a prompt could forge another setting."""
    buffer = io.BytesIO()
    if settings is None:
        image.save(buffer, format="PNG")
        return buffer.getvalue()
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_KEYWORD, json.dumps(settings, ensure_ascii=False, sort_keys=True))
    # for photos level 1 takes a quarter of the time of level 6, and the files are no larger
    image.save(buffer, format="PNG", pnginfo=info, compress_level=1)
    return buffer.getvalue()


def is_marked(path: Path) -> bool:
    """Whether `png` wrote the file, with settings. Its pixels are not decoded. A file that is no PNG, or that
    cannot be read, has no mark; nor has a picture that another program saved again without its text."""
    try:
        with reader.opened(path) as file:
            is_png = file.read(8) == b"\x89PNG\r\n\x1a\n"
            # the text stands before the pixels; a chunk is length, kind, content, checksum
            while is_png and (head := file.read(8))[4:].isalpha() and head[4:] != b"IDAT":
                if file.tell() > _LAST_TEXT:
                    return False
                if head[4:] in (b"iTXt", b"tEXt", b"zTXt"):
                    keyword = _KEYWORD.encode() + b"\0"
                    if file.read(len(keyword)) == keyword:
                        return True
                    file.seek(-len(keyword), io.SEEK_CUR)
                file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    except OSError:
        pass
    return False


def read(data: bytes) -> tuple[Image.Image | None, dict[str, Any]]:
    """(the picture, its settings) of a PNG file that `png` made. The pixels are decoded when they are used.

    The picture is None if it cannot be read, and the settings are {} if there are none.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        settings = reader.parsed_json_table(image.info.get(_KEYWORD, "{}"), _KEYWORD)
    except (*_DAMAGED, UserError):
        return None, {}
    return image, settings


def pixels(image: Image.Image | None) -> Image.Image | None:
    """The picture of `read` as RGB, decoded; None if its pixels are damaged."""
    try:
        return image and image.convert("RGB")
    except _DAMAGED:
        return None


def jpeg(image: Image.Image, longest_side: int, most_bytes: int) -> bytes:
    """The bytes of a JPEG file of the picture, shrunk to sides of at most `longest_side` pixels, in the best
    quality that fits into `most_bytes`."""
    image = scaled(image, longest_side) if max(image.size) > longest_side else image
    for quality in (88, 75, 60, 40, 20):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
        if buffer.tell() <= most_bytes:
            break
    return buffer.getvalue()


def scaled(image: Image.Image, longer_side: int) -> Image.Image:
    """The picture, resized so that its longer side has `longer_side` pixels. A picture enlarged by a factor
    of 2 or more is not smoothed."""
    scale = longer_side / max(image.size)
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]],
    columns: Sequence[str] = (),
    side: int = THUMBNAIL,
) -> Image.Image:
    """A sheet of pictures, their longer sides scaled to `side` pixels. Each of `rows` is (label, pictures);
    None leaves a cell empty. `columns` are headings."""
    font = ImageFont.load_default(13)
    top_margin = _MARGIN + (_HEADING_HEIGHT if columns else 0)
    row_height = _LABEL_HEIGHT + side + _MARGIN
    width = _MARGIN + max(len(images) for _, images in rows) * (side + _MARGIN)
    sheet = Image.new("RGB", (width, top_margin + len(rows) * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        corner = (_MARGIN + number * (side + _MARGIN), _MARGIN)
        pen.text(corner, _fitted(column, side, font), fill="black", font=font)
    for number, (label, images) in enumerate(rows):
        top = top_margin + number * row_height
        pen.text((_MARGIN, top + 2), _fitted(label, width - 2 * _MARGIN, font), fill="black", font=font)
        for column_number, image in enumerate(images):
            if image is not None:
                corner = (_MARGIN + column_number * (side + _MARGIN), top + _LABEL_HEIGHT)
                sheet.paste(scaled(image, side), corner)
    return sheet


def _fitted(text: str, width: int, font: Any) -> str:
    """The text on one line, shortened to `width` pixels with an ellipsis."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    share = width / font.getlength(text)
    return text[: max(1, math.floor(len(text) * share) - 3)] + "..."
