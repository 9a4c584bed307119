"""The words for pictures: tables as people have them, texts beside pictures, names of files.

Tables are text with a header, whose cells are separated by comma, tab, semicolon or bar;
Flickr8k's token file (name.jpg#0<tab>text); .jsonl, an object a line; .json, COCO's captions
or a list of objects; .parquet, of names or of the pictures themselves. What would be a guess
is an error that names file and row; a header is row 1.
"""
import csv
import json
import re
from collections import Counter
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from unicodedata import normalize

# Column names of common data sets; of each list a table has exactly one.
FILE_COLUMNS = ("file", "file_name", "filename", "filepath", "file_path", "path", "image",
                "image_name", "image_path", "image_file", "img", "img_path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "comment", "description", "sentence")
LABEL_COLUMNS = ("label", "class", "class_name", "classname", "category")
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
FLICKR8K = re.compile(r"([^\t#]+\.\w+)#\d+\t(.*)")  # name.jpg#0<tab>text


def caption_of_names(name):
    """"animals/bugs/flying_wasp_02.png" -> "flying wasp, bugs, animals"."""
    phrases = []
    for part in reversed(Path(name).with_suffix("").parts):
        words = [word for word in re.split(r"[\W_]+", part) if word and not word.isdigit()]
        if words:
            phrases.append(" ".join(words))
    return ", ".join(phrases)


def captions_beside(folder, names, lines):
    """Read the .txt files beside pictures -> {name: [captions]}, {name: why none}, notes.

    lines: "first" takes the first line, "all" each as a caption, "one" the whole file as one.
    """
    captions, skipped, notes = {}, {}, Counter()
    for name in names:
        try:
            text = (folder / name).with_suffix(".txt").read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            skipped[name] = "no caption file"
        except UnicodeDecodeError:
            skipped[name] = "caption is not UTF-8"
        else:
            rows = [row for row in text.split("\n") if row.strip()]
            captions[name] = {"first": rows[:1], "all": rows, "one": [text]}[lines]
            if len(rows) > 1 and lines != "one":
                notes[f"caption files have several lines, taken as --lines={lines} (first; "
                      "all: a caption each; one: the file is a caption)"] += 1
    return captions, skipped, notes


# ---------------------------------------------------------------------- tables

def read_texts(file, known=CAPTION_COLUMNS):
    """Yield (picture's name, [its texts]) of each row of a table; a text may be None.

    known: names that the column of texts may have. Raises ValueError naming file and row.
    """
    for number, row in read_table(file):
        where = f"{file}, row {number}"
        name = row[find_column(row, FILE_COLUMNS, where)]
        if not name or not isinstance(name, str):
            raise ValueError(f"{where}: needs the name of a file, as text; a parquet file that "
                             "holds pictures itself is given as IMAGES")
        yield PurePosixPath(name.strip()).as_posix(), texts_of(row, known, where)


def texts_of(row, known, where):
    """The texts in a row's one column of a known name, as a list."""
    texts = row[find_column(row, known, where)]
    texts = texts if isinstance(texts, list) else [texts]
    if not all(isinstance(text, str | None) for text in texts):
        raise ValueError(f"{where}: needs a {known[0]}, as text")
    return texts


def find_column(columns, known, where):
    """The one of `columns` whose name is in `known`; ValueError unless there is exactly one."""
    found = [column for column in columns if column in known]
    if len(found) != 1:
        raise ValueError(f"{where}: needs one column of a {known[0]}, named as one of "
                         f"{', '.join(known)}; the columns are {', '.join(columns)}")
    return found[0]


def read_table(file):
    """Yield (row number, {column in small letters: cell}) of a table of any kind.

    Raises ValueError naming file and row.
    """
    readers = {".json": json_rows, ".jsonl": jsonl_rows, ".parquet": parquet_rows}
    read_rows = readers.get(file.suffix.lower(), text_rows)
    number = 1
    try:
        for row in read_rows(file):
            if row is not None:  # a header, a blank line
                if not isinstance(row, dict):
                    raise ValueError(f"not an object: {str(row)[:40]}")
                yield number, {column.strip().lower(): cell for column, cell in row.items()}
            number += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error}); save it as UTF-8") from None
    except csv.Error:
        raise ValueError(f"{file}, row {number}: a quote that is not closed, or should be "
                         "doubled") from None
    except ValueError as error:
        raise ValueError(f"{file}, row {number}: {error}") from None


def text_rows(file):
    """Rows of a text table; a cell that a row lacks is None."""
    data = file.read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # as Excel saves "Unicode text"
    lines = data.decode("utf-16" if utf16 else "utf-8-sig").split("\n")
    if FLICKR8K.match(lines[0]):
        yield from flickr8k_rows(lines)
        return
    separator = max(SEPARATORS, key=lines[0].count)
    reader = csv.reader([line + "\n" for line in lines], delimiter=separator, strict=True)
    header = [cell.strip() for cell in next(reader)]
    if any(header.count(cell) > 1 for cell in header if cell):
        raise ValueError(f"two columns have one name: {', '.join(header)}")
    yield None
    for cells in reader:
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if len(cells) > len(header):
            raise ValueError(f"{len(cells)} cells, the header has {len(header)}; a text with a "
                             f"{SEPARATORS[separator]} in it needs quotes around it")
        blank = not "".join(cells).strip()
        yield None if blank else dict(zip_longest(header, cells))


def flickr8k_rows(lines):
    for line in lines:
        match = FLICKR8K.match(line)
        if not match and line.strip():
            raise ValueError("not name.jpg#0<tab>text, as row 1 is")
        yield {"file": match[1], "caption": match[2]} if match else None


def jsonl_rows(file):
    """Objects, one a line. A line ends at a newline only: a caption may hold U+2028."""
    for line in file.read_text(encoding="utf-8-sig").split("\n"):
        if line.strip():
            yield json.loads(line) or {}  # null is a row without columns
        else:
            yield None


def json_rows(file):
    """COCO's captions, or a list of objects."""
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    if isinstance(content, list):
        for row in content:
            yield row or {}
        return
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for row in content["annotations"]:
            yield {"file": names[row["image_id"]], "caption": row["caption"]}
    except (KeyError, TypeError) as error:
        raise ValueError("must be COCO's captions (images, annotations) or a list of objects; "
                         f"an entry lacks {error}") from None


def parquet_rows(file):
    """Rows of a parquet file as dicts, a few dozen in memory at a time."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("parquet files are read by pyarrow: pip install pyarrow") from None
    # Streamed: a row group can be the whole file, and then 714 MB of it took 0.97 GB, now 0.3
    with parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
        for batch in table.iter_batches(batch_size=32):
            yield from batch.to_pylist()


def parquet_pictures(file):
    """Yield (name, bytes, [captions]) of a parquet file's rows; the name is FILE-0000012."""
    for number, row in read_table(file):
        where = f"{file}, row {number}"
        pictures = []
        for cell in row.values():
            if isinstance(cell, dict):  # as `datasets` writes it
                cell = cell.get("bytes")
            if isinstance(cell, bytes):
                pictures.append(cell)
        if len(pictures) > 1:
            raise ValueError(f"{where}: several columns hold bytes; keep the pictures'")
        data = pictures[0] if pictures else b""
        yield f"{file.stem}-{number - 1:07d}", data, texts_of(row, CAPTION_COLUMNS, where)


# ---------------------------------------------------------------------- names of pictures

def match_names(table, pictures, folder):
    """Find the pictures that a table means: {picture: texts}, and [(name, reason)] of the rest.

    table: {name: texts}. pictures: names relative to `folder`. A table may put before them a
    path that ends as the folder's own, or else one absolute path of elsewhere before all.
    """
    by_name = {spell(picture): picture for picture in pictures}
    by_stem = {PurePosixPath(name).stem.lower(): name for name in by_name}
    found = {}  # path -> {name in the table: the picture whose name stands behind that path}
    for name in table:
        parts = re.split("(?<=/)", spell(name))  # each but the last keeps its "/"
        for i in range(len(parts)):
            picture = by_name.get("".join(parts[i:]))
            if picture:
                found.setdefault("".join(parts[:i]), {})[name] = picture
    meant = {}
    for path in choose_paths(found, folder):
        meant = found[path] | meant
    matched, missing = {}, []
    for name, texts in table.items():
        if name in meant:
            matched.setdefault(meant[name], []).extend(texts)
        else:
            near = by_stem.get(PurePosixPath(spell(name)).stem.lower(), "none")
            missing.append((name, f"no such picture; near: {near}"))
    return matched, missing


def spell(name):
    """One spelling: macOS stores accents apart, Windows writes backslashes."""
    return normalize("NFC", name).replace("\\", "/")


def choose_paths(paths, folder):
    """Those that end as the folder's own path does, or are ""; else one absolute before all."""
    paths = sorted(paths, key=len)
    places = spell(f"/{folder.absolute()}/"), spell(f"/{folder.resolve()}/")
    own = [path for path in paths
           if places[0].endswith(f"/{path}") or places[1].endswith(f"/{path}")]
    absolute = [path for path in paths if re.match("/|[^/]+:/", path)]
    if not own and all(path.startswith(absolute[0]) for path in absolute):
        return absolute[:1]  # /a/ stands before /a/b/, which it explains
    return own
