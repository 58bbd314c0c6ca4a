"""Which files of a folder are pictures. The first bytes of a file decide, not the ending of its name.

Phones, browsers and mail programs give pictures wrong endings, or none. Only names are sorted here; a picture
is decoded in `photos`.
"""

import codecs
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import PIL

from dreambooth.files import pictures as png_files
from dreambooth.io import reader
from dreambooth.io.errors import UserError, few, shown

HEAD = 4096  # bytes that decide what a file is
LARGEST = 2**29  # bytes of a picture's file: 64 million pixels, unpacked, of four colours of 16 bits
METADATA = ("metadata.jsonl", "metadata.csv")  # captions of a folder: the first that exists is read
CAPTION_ENDINGS = (".txt", ".caption")  # of the file beside a photo that holds its caption
_SAVE = "save it as PNG or JPEG"
# Formats that are read, by Pillow's name, with the usual ending first.
READ = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".jfi", ".pjpeg", ".pjp", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pnm"),
    "QOI": (".qoi",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# Formats that Pillow reads by a plugin: its module, and the usual endings. The extra `photos` installs them.
PLUGINS = {"HEIF": ("pillow_heif", (".heic", ".heif", ".hif")), "JXL": ("pillow_jxl", (".jxl",))}
_DISTRIBUTIONS = {"HEIF": "pillow-heif", "JXL": "pillow-jxl-plugin"}
INSTALLED = [name for name, (module, _) in PLUGINS.items() if importlib.util.find_spec(module)]
READ |= {name: PLUGINS[name][1] for name in INSTALLED}
FORMATS = tuple(READ)
ENDINGS = frozenset(ending for endings in READ.values() for ending in endings)
_RAW_ENDINGS = re.compile(
    r"\.(3fr|arw|cr2|dcr|dng|erf|iiq|kdc|mef|mos|nef|nrw|orf|pef|raw|rw2|sr2|srf|srw)", re.I
)
# Files of this program beside class images: the manifest, the lock, and hashes of new pictures.
_RECORDS = re.compile(r"manifest\.json|\.lock|\.class-.*|\.dreambooth.*|\.written.*", re.S)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a file is."""

    name: str
    """With its article, as in "an HTML page"."""
    format: str | None = None
    """Pillow's name of the format, a key of READ; None for what is not read."""
    advice: str = ""
    """What the user can do, as the end of a sentence."""


_HIDDEN, _FOLDER = Kind("a hidden or system file"), Kind("a folder")
_UNREADABLE, _SPECIAL = Kind("an unreadable file"), Kind("a special file")
_EMPTY, _TEXT, _UNKNOWN = Kind("an empty file"), Kind("a text file"), Kind("a file of an unknown kind")
_ZEROS = Kind("a file of zeros only", advice="copy it again")
_HTML = Kind("an HTML page", advice="download the picture itself")
_RAW, _SVG = Kind("a camera raw picture", advice=_SAVE), Kind("an SVG drawing", advice=_SAVE)


def _kind_by_plugin(name: str, format: str, advice: str) -> Kind:
    """The kind of a format in PLUGINS."""
    if format in INSTALLED:
        return Kind(name, format)
    return Kind(name, advice=f"{advice}, or pip install '.[photos]', which reads it")


_HEIC = _kind_by_plugin("a HEIC picture", "HEIF", "convert it to JPEG or PNG")
_DRAWN = Kind(
    "a picture of this program",
    advice="what it draws is no photo; a picture that another program saves anew, as JPEG, counts as one",
)
_VIDEO, _SOUND, _WEIGHTS = Kind("a video"), Kind("a sound file"), Kind("a safetensors file")
_KINDS = {name: Kind(f"a {name} picture", name) for name in READ}

# The first bytes of files. No file begins like one of another kind.
_MAGIC: dict[Kind, tuple[bytes, ...]] = {
    _KINDS["PNG"]: (b"\x89PNG\r\n\x1a\n",),
    _KINDS["JPEG"]: (b"\xff\xd8\xff",),
    _KINDS["GIF"]: (b"GIF87a", b"GIF89a"),
    _KINDS["JPEG2000"]: (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    _KINDS["QOI"]: (b"qoif",),
    _kind_by_plugin("a JPEG XL picture", "JXL", _SAVE): (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    Kind("a Photoshop file", advice=_SAVE): (b"8BPS",),
    Kind("a GIMP file", advice=_SAVE): (b"gimp xcf",),
    Kind("a PDF file", advice="save its pictures as PNG or JPEG"): (b"%PDF",),
    Kind("an icon", advice=_SAVE): (b"\0\0\1\0", b"\0\0\2\0", b"icns"),
    _RAW: (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"\0MRM", b"FOVb"),
    Kind("an archive"): (
        *(b"PK\3\4", b"PK\5\6", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"),
        *(b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\7", b"\x28\xb5\x2f\xfd"),
    ),
    _VIDEO: (b"\x1a\x45\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"FLV\1"),
    _SOUND: (b"ID3", b"OggS", b"fLaC"),
    Kind("a NumPy file"): (b"\x93NUMPY",),
    Kind("a Windows shortcut", advice="copy the file that it names"): (b"L\0\0\0\1\x14\2\0",),
    Kind("an AppleDouble file of macOS", advice="copy the picture itself"): (b"\0\5\x16\7",),
    Kind("a Git LFS pointer", advice="git lfs pull fetches the file itself"): (b"version https://git-lfs",),
}
# Brands of files in the container of MP4: ISO/IEC 14496-12, section 4.3.
_AVIF_BRANDS, _RAW_BRANDS = {b"avif", b"avis"}, {b"crx "}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes in bytes of the second header
_REDUCED, _SUB_FILES, _DNG_VERSION, _COLOUR_FILTER = 254, 330, 50706, 32803  # TIFF 6.0, TIFF/EP and DNG


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a folder."""

    pictures: list[str]
    """Names, sorted by their bytes: pictures by content, and what has a picture's ending. Those of the second
    kind may be no pictures: `photos.check_folder` refuses them by name."""
    skipped: Mapping[Kind, list[str]]
    """The other names by kind. Captions are left out."""

    def described(self) -> str:
        """How many files of each kind are skipped, their names, and advice; "" if there are none."""
        parts = []
        for kind, names in self.skipped.items():
            article, _, noun = kind.name.partition(" ")
            counted = f"{len(names)} {_plural(noun)}" if len(names) > 1 else f"{article} {noun}"
            inside = "" if kind is _HIDDEN else f" ({few(names)})"
            parts.append(counted + inside + (f": {kind.advice}" if kind.advice else ""))
        return "; ".join(parts)


def list_folder(folder: Path, flag: str, made: Collection[str] = ()) -> Listing:
    """The files of `folder`, which `flag` named, by what they are. Raises UserError if it cannot be read.

    Pictures that this program drew are skipped, but for the names in `made`.
    """
    pictures: list[str] = []
    kinds: dict[str, Kind] = {}
    for name in names(folder, flag):
        if name.startswith(".") or name in ("Thumbs.db", "ehthumbs.db", "desktop.ini"):
            kinds[name] = _HIDDEN
            continue
        kind = _kind_at(folder / name)
        if kind.format == "PNG" and name not in made and png_files.is_marked(folder / name):
            kinds[name] = _DRAWN
            continue
        if kind.format or Path(name).suffix.lower() in ENDINGS:
            pictures.append(name)
        else:
            kinds[name] = kind
    stems = {Path(name).stem for name in pictures if not name.endswith(CAPTION_ENDINGS)}
    skipped: dict[Kind, list[str]] = {}
    for name, kind in kinds.items():
        if not _is_caption_file(name, stems) and not _RECORDS.fullmatch(name):
            skipped.setdefault(kind, []).append(name)
    pictures = [name for name in pictures if not _is_caption_file(name, stems)]
    return Listing(pictures, dict(sorted(skipped.items(), key=lambda entry: entry[0] is _HIDDEN)))


def read_within(folder: Path, name: str, where: str, largest: int, *, follow_symlinks: bool) -> bytes:
    """The content of a file in a folder of the user. Messages begin with `where`.

    Raises UserError as `reader.read_bytes` does, and without `follow_symlinks` if the file lies in another
    folder, behind a link.
    """
    data = reader.read_bytes(folder / name, where, largest)
    target = (folder / name).resolve()
    if not follow_symlinks and not target.is_relative_to(folder.resolve()):
        raise UserError(
            f"{where}: a link to {shown(target)}, outside the folder; copy the file, or give "
            "--follow_symlinks"
        )
    return data


def names(folder: Path, flag: str) -> list[str]:
    """The names in a folder, sorted independently of locale and file system."""
    try:
        if not folder.exists():
            raise UserError(f"{flag}: there is no folder {shown(folder)}")
        if not folder.is_dir():
            raise UserError(
                f"{flag}: {shown(folder)} is not a folder; name the folder that holds the pictures"
            )
        return sorted(os.listdir(folder), key=os.fsencode)
    except OSError as error:  # no permission, or a name that is too long
        raise UserError(f"{flag}: {shown(folder)} cannot be read: {error.strerror or error}") from None


def _is_caption_file(name: str, stems: set[str]) -> bool:
    """Whether a file holds captions; `stems` are the names of the pictures without ending."""
    path = Path(name)
    return name in METADATA or (path.suffix in CAPTION_ENDINGS and path.stem in stems)


def _kind_at(path: Path) -> Kind:
    """What lies at `path`."""
    try:
        with reader.opened(path) as file:
            kind = identify(file.read(HEAD))
    except IsADirectoryError:
        return _FOLDER
    except reader.NotRegular:
        return _SPECIAL
    except OSError:
        return _UNREADABLE
    # camera raw files of many makers are TIFF files, whose first picture is a thumbnail
    return _RAW if kind.format == "TIFF" and _RAW_ENDINGS.fullmatch(path.suffix) else kind


def decoders() -> str:
    """The versions of Pillow and of its installed plugins: another version may decode other pixels."""
    names = [_DISTRIBUTIONS[format] for format in INSTALLED]
    return ", ".join([PIL.__version__, *(f"{name} {importlib.metadata.version(name)}" for name in names)])


@functools.cache
def load_plugin(format: str) -> None:
    """Make Pillow read a format of PLUGINS that is installed."""
    plugin = importlib.import_module(PLUGINS[format][0])  # pillow_jxl registers itself
    if format == "HEIF":
        plugin.register_heif_opener()


def identify(data: bytes) -> Kind:
    """What a file is whose content, or whose beginning, is `data`."""
    head = data[:HEAD]
    for kind, starts in _MAGIC.items():
        if head.startswith(starts):
            return kind
    if head[:4] == b"RIFF":
        return {b"WEBP": _KINDS["WEBP"], b"AVI ": _VIDEO, b"WAVE": _SOUND}.get(head[8:12], _UNKNOWN)
    if head[4:8] == b"ftyp":
        return _in_mp4_container(head)
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # older QuickTime files
        return _VIDEO
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return _KINDS["BMP"]
    if head[:4] in (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+"):
        return _RAW if _is_camera_raw(head) else _KINDS["TIFF"]
    if re.match(rb"P[2356]\s+(#[^\n]*\n\s*)*\d+\s", head):
        return _KINDS["PPM"]
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 2**32:
        return _WEIGHTS
    return _text_kind(head)


def _in_mp4_container(head: bytes) -> Kind:
    """HEIC, AVIF, camera raw or video, by the brands that a file names as its own and as compatible."""
    compatible = head[16 : max(16, int.from_bytes(head[:4], "big"))]
    brands = {head[8:12], *(compatible[start : start + 4] for start in range(0, len(compatible), 4))}
    if brands & _AVIF_BRANDS:
        return _KINDS["AVIF"]
    if brands & _RAW_BRANDS:
        return _RAW
    return _HEIC if brands & _HEIC_BRANDS else _VIDEO


def _is_camera_raw(head: bytes) -> bool:
    """Whether a TIFF file is a camera's: by the tags of its first picture, if they lie in `head`."""
    if head[8:10] == b"CR":  # Canon
        return True
    if b"+" in head[2:4]:  # files over 4 GB have another structure
        return False
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    place = int.from_bytes(head[4:8], order)
    count = int.from_bytes(head[place : place + 2], order)
    tags = {}
    for start in range(place + 2, min(place + 2 + 12 * count, len(head) - 11), 12):
        size = 2 if int.from_bytes(head[start + 2 : start + 4], order) == 3 else 4  # kind 3: 16 bits
        tags[int.from_bytes(head[start : start + 2], order)] = int.from_bytes(
            head[start + 8 : start + 8 + size], order
        )
    is_thumbnail = bool(tags.get(_REDUCED, 0) & 1) and _SUB_FILES in tags
    return _DNG_VERSION in tags or is_thumbnail or tags.get(262) == _COLOUR_FILTER


def _text_kind(head: bytes) -> Kind:
    """What a file without magic number is."""
    if not head:
        return _EMPTY
    if not head.strip(b"\0"):
        return _ZEROS
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _TEXT
    try:
        # the last character of a longer file may be cut
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError:
        return _UNKNOWN
    if re.search(r"[\0-\x08\x0e-\x1a\x1c-\x1f]", text):
        return _UNKNOWN
    start = text.lstrip().lower()
    if not start.startswith("<"):
        return _TEXT
    if re.search(r"<!doctype html|<html|<head>|<body|<script", start):
        return _HTML
    return _SVG if "<svg" in start else _TEXT


def _plural(noun: str) -> str:
    """The plural of a kind's name: its first noun is the word before " of " or the last one."""
    first, of, rest = noun.partition(" of ")
    return f"{first}s{of}{rest}"
