"""The words for pictures: tables as people have them, texts beside pictures, names of files.

Tables are text with a header, whose cells are separated by comma, tab, semicolon or bar;
Flickr8k's token file (name.jpg#0<tab>text); .jsonl, an object a line; .json, COCO's (images,
annotations) or a list of objects; .parquet, of names or of the pictures themselves. What would
be a guess is an error that names file and row. Rows are counted as a spreadsheet does, a header
being row 1.
"""
import csv
import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from unicodedata import normalize

# Column names of common data sets; of each list a table has exactly one.
FILE_COLUMNS = ("file", "file_name", "filename", "filepath", "file_path", "path", "image",
                "image_name", "image_path", "image_file", "img", "img_path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "comment", "description", "sentence")
LABEL_COLUMNS = ("label", "class", "class_name", "classname", "category")
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
FLICKR8K = re.compile(r"([^\t#]+\.\w+)#\d+\t(.*)")  # name.jpg#0<tab>text


# ---------------------------------------------------------------------- without a table

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
            continue
        except UnicodeDecodeError:
            skipped[name] = "caption is not UTF-8"
            continue
        rows = [row for row in text.split("\n") if row.strip()]  # \r\n was read as \n
        if lines == "one":
            captions[name] = [text]
            continue
        captions[name] = rows if lines == "all" else rows[:1]
        if len(rows) > 1:
            taken = "each is a caption" if lines == "all" else "the first is taken"
            notes[f"caption files have several lines: {taken} (--lines=first, --lines=all, or "
                  "--lines=one: the whole file is one caption)"] += 1
    return captions, skipped, notes


# ---------------------------------------------------------------------- tables

def read_captions(file, columns=""):
    """A table -> {name: [captions]}, and a Counter of what the reader of a report should know.

    columns: "FILE,CAPTION" where the table's columns have unusual names. Raises ValueError.
    """
    table, notes = {}, Counter()
    for _, name, texts in _named_texts(file, _known_columns(columns)):
        table.setdefault(name, []).extend(texts)
        if not any(text and text.strip() for text in texts):
            notes["rows without a caption"] += 1
    return table, notes


def read_labels(file):
    """A table -> {name: [labels]}. Raises ValueError."""
    table = {}
    for where, name, texts in _named_texts(file, (FILE_COLUMNS, LABEL_COLUMNS)):
        for text in texts:
            if not text or not text.strip():
                raise ValueError(f"{where}: {name} has no label")
            table.setdefault(name, []).append(text.strip())
    return table


def _known_columns(columns):
    """(names for the file's column, names for the caption's), with --columns or without."""
    if not columns:
        return FILE_COLUMNS, CAPTION_COLUMNS
    file, comma, caption = columns.lower().partition(",")
    if not comma or "," in caption:
        raise ValueError(f"--columns={columns}: write two names, the file's and the caption's")
    return (file.strip(),), (caption.strip(),)


def _named_texts(file, known):
    """Yield ("file, row n", name, [texts]) of a table; texts may be None or blank."""
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    read_rows = readers.get(file.suffix.lower(), _text_rows)
    try:
        for number, row in read_rows(file, known):
            where = f"{file}, row {number}"
            name = row[find_column(row, known[0], where)]
            texts = row[find_column(row, known[1], where)]
            texts = texts if isinstance(texts, list) else [texts]
            if not name or not isinstance(name, str):
                raise ValueError(f"{where}: needs the name of a file, as text")
            if not all(isinstance(text, str | None) for text in texts):
                raise ValueError(f"{where}: needs a {known[1][0]}, as text")
            yield where, PurePosixPath(name.strip()).as_posix(), texts
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not readable as UTF-8 ({error})") from None


def find_column(columns, known, where):
    """The one of `columns` whose name is in `known`; ValueError unless there is exactly one."""
    found = [column for column in columns if column.lower() in known]
    if len(found) == 1:
        return found[0]
    problem = f"must be one of {', '.join(known)}"
    if found:
        problem = f"could be {' or '.join(found)}"
    raise ValueError(f"{where}: the column of the {known[0]} {problem}; the columns are "
                     f"{', '.join(columns)}; --columns=FILE,CAPTION names others")


# ---------------------------------------------------------------------- kinds of tables

def _text_rows(file, known):
    """(number, row) of a text table; a row is a dict, with None where it has no cell."""
    data = file.read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # as Excel saves "Unicode text"
    text = data.decode("utf-16" if utf16 else "utf-8-sig")
    lines = text.split("\n")
    if FLICKR8K.match(lines[0]):
        yield from _flickr8k_rows(lines, file, known)
        return
    separator = _find_separator(lines[0], known, f"{file}, row 1")
    reader = csv.reader([line + "\n" for line in lines], delimiter=separator, strict=True)
    header, number = None, 0
    try:
        for number, cells in enumerate(reader, 1):
            if header is None:
                header = [cell.strip().lower() for cell in cells]
            elif any(cell.strip() for cell in cells):
                yield number, _row_of(header, cells, separator, f"{file}, row {number}")
    except csv.Error as error:
        raise ValueError(f"{file}, row {number + 1}: {error}; a cell that starts with a quote "
                         "ends with one, and quotes inside it are doubled") from None


def _find_separator(line, known, where):
    """The separator with which a header has a column of a file and one of a text."""
    for separator in SEPARATORS:
        cells = next(csv.reader([line.lower()], delimiter=separator), [])
        cells = {cell.strip() for cell in cells}
        if cells & set(known[0]) and cells & set(known[1]):
            return separator
    raise ValueError(f"{where}: needs a file ({', '.join(known[0])}) and a {known[1][0]} "
                     f"({', '.join(known[1])}), separated by comma, tab, semicolon or bar; it "
                     f"is {line.strip()[:80]!r}; --columns=FILE,CAPTION names others")


def _row_of(header, cells, separator, where):
    """{column: cell}; ValueError for more cells than the header has."""
    while len(cells) > len(header) and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) > len(header):
        raise ValueError(f"{where}: {len(cells)} cells, the header has {len(header)}; a text "
                         f"with a {SEPARATORS[separator]} in it needs quotes around it")
    row = dict.fromkeys(header)
    row.update(zip(header, cells))
    return row


def _flickr8k_rows(lines, file, known):
    for number, line in enumerate(lines, 1):
        match = FLICKR8K.match(line)
        if match:
            yield number, {known[0][0]: match[1], known[1][0]: match[2]}
        elif line.strip():
            raise ValueError(f"{file}, row {number}: not name.jpg#0<tab>text, as row 1 is")


def _jsonl_rows(file, known):
    """Objects, one a line. A line ends at a newline only: a caption may hold U+2028."""
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            where = f"{file}, row {number}"
            yield number, _small_keys(_parse(line, where), where)


def _json_rows(file, known):
    """COCO's captions, or a list of objects."""
    content = _parse(file.read_text(encoding="utf-8-sig"), str(file))
    if isinstance(content, list):
        for number, row in enumerate(content, 1):
            yield number, _small_keys(row, f"{file}, row {number}")
        return
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{file}: must be COCO's (images, annotations) or a list of objects")
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for number, row in enumerate(content["annotations"], 1):
            yield number, {known[0][0]: names[row["image_id"]], known[1][0]: row["caption"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: not COCO's captions, an entry lacks {error}") from None


def _parse(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None


def _small_keys(row, where):
    """A JSON object with its keys in small letters; ValueError for any other value."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not an object: {str(row)[:40]}")
    return {key.strip().lower(): value for key, value in row.items()}


# ---------------------------------------------------------------------- parquet

def picture_column(file):
    """The column of a parquet file that holds the pictures' bytes themselves, or None."""
    if file.suffix.lower() != ".parquet":
        return None
    found = []
    for field in _schema(file):
        kind = str(field.type)  # `datasets` writes struct<bytes: binary, path: string>
        if kind in ("binary", "large_binary") or kind.startswith("struct<bytes: "):
            found.append(field.name)
    if len(found) > 1:
        raise ValueError(f"{file}: columns {', '.join(found)} all hold bytes; keep one")
    return found[0] if found else None


def parquet_pictures(file, columns=""):
    """Yield (name, bytes, [captions]) of a parquet file's rows; the name is FILE-0000012."""
    picture = picture_column(file)
    text = find_column(_schema(file).names, _known_columns(columns)[1], str(file))
    for number, row in enumerate(_parquet_dicts(file, [picture, text])):
        data, texts = row[picture.lower()], row[text.lower()]
        if isinstance(data, dict):
            data = data["bytes"]
        texts = texts if isinstance(texts, list) else [texts]
        yield f"{file.stem}-{number:07d}", data or b"", texts


def _parquet_rows(file, known):
    """(number, row) of a parquet file that names pictures."""
    columns = [name for name in _schema(file).names if name.lower() in known[0] + known[1]]
    return enumerate(_parquet_dicts(file, columns), 1)


def _schema(file):
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError("parquet files are read by pyarrow: pip install pyarrow") from None
    try:
        return parquet.read_schema(file)
    except ArrowInvalid as error:
        raise ValueError(f"{file}: broken ({' '.join(str(error).split())})") from None


def _parquet_dicts(file, columns):
    """Rows of some columns, keys in small letters, a few dozen in memory at a time."""
    from pyarrow import parquet
    with parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
        for batch in table.iter_batches(batch_size=32, columns=columns):
            for row in batch.to_pylist():
                yield {key.lower(): value for key, value in row.items()}


# ---------------------------------------------------------------------- names of pictures

def match_names(table, pictures, folder):
    """Find the pictures that a table means: {picture: texts}, and [(name, reason)] of the rest.

    pictures: names relative to `folder`. A table may put before them a path that ends as the
    folder's own, or one absolute path before all. Of other names near misses are named.
    """
    by_name, by_stem = {}, {}
    for picture in pictures:
        by_name[normalize("NFC", picture)] = picture  # macOS spells accents apart
        by_stem.setdefault(PurePosixPath(picture).stem.lower(), picture)
    spelled = {}
    for name in table:
        plain = normalize("NFC", name)
        spelled[name] = plain if plain in by_name else plain.replace("\\", "/")
    prefixes = _find_prefixes(spelled.values(), by_name, folder)
    matched, missing = {}, []
    for name, texts in table.items():
        picture = by_name.get(spelled[name])
        for prefix in prefixes:
            picture = picture or by_name.get(spelled[name].removeprefix(prefix))
        near = by_stem.get(PurePosixPath(spelled[name]).stem.lower())
        if picture:
            matched.setdefault(picture, []).extend(texts)
        elif near:
            missing.append((name, f"no such picture; near: {near}"))
        else:
            missing.append((name, "no such picture"))
    return matched, missing


def _find_prefixes(names, by_name, folder):
    """What stands before the pictures' names in a table, with "/" at the end."""
    found = set()
    for name in names:
        parts = name.split("/")
        for i in range(1, len(parts)):
            if name not in by_name and "/".join(parts[i:]) in by_name:
                found.add("/".join(parts[:i]) + "/")
    here = [f"/{path.as_posix()}/" for path in (folder.absolute(), folder.resolve())]
    own = {prefix for prefix in found for path in here if path.endswith(f"/{prefix}")}
    if own:
        return own
    roots = []
    for prefix in sorted(found):  # /a/ stands before /a/b/, which /a/ explains
        absolute = re.match("/|[A-Za-z]:/", prefix)
        if absolute and not any(prefix.startswith(root) for root in roots):
            roots.append(prefix)
    return roots if len(roots) == 1 else []
