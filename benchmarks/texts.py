"""English texts that Debian's packages hold, each cut into a part to calibrate and train on and a part to evaluate on.

    apt-get install dict-foldoc fortunes r-cran-janeaustenr

A dictionary of computing, quotations, novels. Read where the packages put them, or below another root.
"""

import gzip
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

PLACES = {
    "dictionary": "usr/share/dictd/foldoc.dict.dz",
    "quotations": "usr/share/games/fortunes",
    "novels": "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
}
HELD_OUT = 0.3  # of each text, its end


def read(root: Path = Path("/")) -> dict[str, str]:
    """The texts by name, those whose package is there."""
    readers = {"dictionary": dictionary, "quotations": quotations, "novels": novels}
    found = {name: root / place for name, place in PLACES.items() if (root / place).exists()}
    return {name: readers[name](path) for name, path in found.items()}


def dictionary(file: Path) -> str:
    """Articles on computing, with lines joined to paragraphs."""
    text = gzip.decompress(file.read_bytes()).decode(errors="replace")
    text = re.sub(r"[{}]", "", text)
    text = re.sub(r"\n[ \t]+", "\n", text)
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def quotations(folder: Path) -> str:
    """Sayings, those of one file after those of another."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.suffix)
    return "\n".join(f.read_text(errors="replace").replace("\n%\n", "\n\n") for f in files)


def novels(file: Path) -> str:
    """Jane Austen's, line by line as R stores strings: four bytes of flags, four of length, the characters."""
    data, books = file.read_bytes(), []
    while data:
        unpacked = zlib.decompressobj()
        body = unpacked.decompress(data[4:])  # after its length
        lines = re.split(rb"\x00\x04\x00\x09....", body, flags=re.DOTALL)[1:]
        books.append("\n".join(line.decode(errors="replace") for line in lines))
        data = unpacked.unused_data
    return "\n\n".join(books)


def parts(texts: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The parts to train on, and those to evaluate on."""
    cut = {name: round((1 - HELD_OUT) * len(text)) for name, text in texts.items()}
    return (
        {name: text[: cut[name]] for name, text in texts.items()},
        {name: text[cut[name] :] for name, text in texts.items()},
    )
