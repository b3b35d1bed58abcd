"""The lines of a data file: one JSON object each, plain or gzipped, as if a stranger wrote them.

What has one meaning is read: a byte order mark at the beginning, Windows' line ends, blank lines at
the end, a last line without its new line, NaN in a field that nobody uses. Every other bad line is
an error that names file and line. A file of another kind is named, with the command that converts
it; such a command writes a new file, converted.jsonl, and never over one that exists.
"""

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator

from minirlhf.files.disk import finite_float, open_regular, short, short_int, unique_keys
from minirlhf.files.foreign import HEAD, contents

MAX_LINE = 1 << 20                  # bytes of one row, unpacked
MAX_TEXT = 1 << 30                  # bytes of one file, unpacked
MAX_PACKED = 256 << 20              # bytes of one gzipped file
MAX_ROWS = 2_000_000
MAX_HEADER = 2000                   # bytes of a first line in which a table's columns are sought
COLUMN = re.compile(r"[\w#-]+(?:[ ./][\w#()-]+){0,2}")     # a column's name: one to three words
GZIP, BOM = b"\x1f\x8b", b"\xef\xbb\xbf"


# ---- conversions ---------------------------------------------------------------------------------

def convert(rows: str, imports: str = "json") -> str:
    """How to write what the Python expression `rows` gives, one JSON object a line."""
    return (f"convert it by: python -c \"import {imports}; open('converted.jsonl', 'x').writelines("
            f"json.dumps(row) + '\\n' for row in {rows})\"")


def convert_text(encoding: str) -> str:
    """How to write a text file of another encoding as UTF-8."""
    return ("convert it by: python -c \"open('converted.jsonl', 'x', encoding='utf-8').write("
            f"open('FILE', encoding='{encoding}').read())\"")


def unpack(module: str) -> str:
    """How to unpack what this module of Python's library opens."""
    return (f"unpack them by: python -c \"import shutil, {module}; shutil.copyfileobj("
            f"{module}.open('FILE'), open('converted.jsonl', 'xb'))\"")


ROWS = "map(json.loads, open('FILE', encoding='utf-8-sig'))"     # of a file with an object per line
ARRAY = convert("json.load(open('FILE', encoding='utf-8-sig'))")
# careful: a new line never stands inside a JSON text, so "}", new line, "{" is between two objects
OBJECTS = convert(r"json.loads('[' + re.sub(r'}\s*\n\s*{', '},{', "
                  "open('FILE', encoding='utf-8-sig').read()) + ']')", "json, re")
COMMAS = convert("map(json.loads, (line.strip().rstrip(',') for line in open('FILE', "
                 "encoding='utf-8-sig') if line.strip()))")
PYTHON_ROWS = convert("map(ast.literal_eval, open('FILE', encoding='utf-8'))", "ast, json")
PROMPT_LINES = convert("({'prompt': line} for line in open('FILE', encoding='utf-8') "
                       "if line.strip())")
PANDAS = ("convert it by: python -c \"import pandas; pandas.{}('FILE').to_json('converted.jsonl', "
          "orient='records', lines=True)\" (with pandas and pyarrow)")

# The first bytes of a file, what it then is, and how to get JSON lines from it; what has no such
# way is named by `foreign.contents`.
KINDS = [
    (b"\xff\xfe\0\0", "UTF-32 text", convert_text("utf-32")),
    (b"\xff\xfe", "UTF-16 text", convert_text("utf-16")),
    (b"\xfe\xff", "UTF-16 text", convert_text("utf-16")),
    (b"{\0", "UTF-16 text", convert_text("utf-16-le")),
    (b"\0{", "UTF-16 text", convert_text("utf-16-be")),
    (b"PAR1", "a Parquet file", PANDAS.format("read_parquet")),
    (b"ARROW1", "an Arrow file", PANDAS.format("read_feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream, as datasets keeps it", "convert it by: python -c "
     "\"import datasets; datasets.Dataset.from_file('FILE').to_json('converted.jsonl')\""),
    (b"\xfd7zXZ\0", "xz data", unpack("lzma")),
    (b"BZh", "bzip2 data", unpack("bz2")),
    (GZIP, "gzip data", unpack("gzip")),                 # inside other gzip data
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "unpack them by: zstd -d FILE -o converted.jsonl"),
    (b"\x04\x22\x4d\x18", "LZ4 data", "unpack them by: lz4 -d FILE converted.jsonl"),
    (b"PK\x03\x04", "a zip archive", "unpack it by: python -m zipfile -e FILE . (if it is an "
     "Excel workbook: save it as CSV)"),
    (b"SQLite format 3", "an SQLite database", "export its table as CSV"),
    (b"[", "an array", ARRAY),
    (b"{'", "Python's notation", PYTHON_ROWS)]


def name_kind(line: bytes) -> tuple[str, str]:
    """What a file with this first line is instead of JSON lines, and the way out; "", "" if not.

    Example: name_kind(b"[1, 2]")[0] == "an array", name_kind(b'{"a": 1}') == ("", "").
    """
    text = line.strip()
    for start, name, way_out in KINDS:
        if line.startswith(start) or (start in (b"[", b"{'") and text.startswith(start)):
            return name, way_out
    if text.startswith(b"{"):
        return name_objects(text, len(line) > MAX_LINE)
    if not text:
        return "", ""
    if re.search(rb"[\0-\x08\x0e-\x1a]", text[:MAX_HEADER]):
        name = contents(line[:HEAD]) or f"binary data that begin with {short(line[:12])}"
        return name, "name a file of JSON lines"
    return name_table(text.decode("utf-8", errors="replace"))


def name_objects(text: bytes, cut: bool) -> tuple[str, str]:
    """How objects are written other than one per line; `cut`: the line is not here to its end."""
    if re.search(rb"\}[ \t]*\r[ \t]*\{", text):
        return r"lines that end in \r alone", convert_text("utf-8")
    if cut or text.endswith(b"}"):
        return "", ""
    if text.endswith(b"},"):
        return "a comma after the object", COMMAS
    return "an object over several lines, or one that is cut off", OBJECTS


def name_table(line: str) -> tuple[str, str]:
    """A table whose header this line may be, or plain text; and its conversion."""
    separator, cells, header = "", [], line[:MAX_HEADER].splitlines()[0]
    for mark in "\t,;|":
        names = next(csv.reader([header], delimiter=mark))
        if len(names) > max(1, len(cells)) and all(COLUMN.fullmatch(name) for name in names):
            separator, cells = mark, names
    if not cells:
        return f"text, {short(line)}", f"if every line is a prompt, {PROMPT_LINES}"
    option = "" if separator == "," else f", delimiter={separator!r}"
    reading = f"csv.DictReader(open('FILE', encoding='utf-8-sig', newline=''){option})"
    return (f"a {'TSV' if separator == chr(9) else 'CSV'} table with the columns {short(cells)}",
            convert(reading, "csv, json"))


# ---- lines ---------------------------------------------------------------------------------------

def read_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield ("file:line", line) for each line of a JSONL file, plain or gzipped.

    Holds one line of at most `MAX_LINE` at a time, so a gzip bomb ends in an error.
    """
    size, blank = 0, ""
    with open_regular(path) as file:
        packed = file.read(2) == GZIP
        file.seek(0)
        packed_size = os.fstat(file.fileno()).st_size if packed else 0
        if packed_size > MAX_PACKED:
            raise ValueError(f"{path}: expected at most {MAX_PACKED} bytes of gzip data, found "
                             f"{packed_size}; split the file")
        stream = gzip.GzipFile(fileobj=file) if packed else file
        for number in range(1, MAX_ROWS + 2):
            place = f"{path}:{number}"
            try:
                line = stream.readline(MAX_LINE + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{place}: expected whole gzip data, found: {error}") from None
            size += len(line)
            if number == 1:
                line = check_first(line.removeprefix(BOM), place, packed)
            elif not line:
                return
            if len(line) > MAX_LINE:
                raise ValueError(f"{place}: expected lines of at most {MAX_LINE} bytes, found a "
                                 "longer one")
            if size > MAX_TEXT or number > MAX_ROWS:
                raise ValueError(f"{place}: expected at most {MAX_ROWS} lines and {MAX_TEXT} "
                                 "bytes, found more; split the file")
            if line.isspace():
                blank = blank or place
            elif blank:
                raise ValueError(f"{blank}: expected a JSON object, found a blank line before other"
                                 " rows; delete it, if no row is missing there")
            else:
                yield place, line


def check_first(line: bytes, place: str, packed: bool) -> bytes:
    """The first line of a file, unless it shows that the file holds no JSON lines."""
    if not line:
        raise ValueError(f"{place}: expected one JSON object per line, found an empty file")
    if line.isspace() and len(line) <= MAX_LINE:
        raise ValueError(f"{place}: expected a JSON object, found a blank line")
    name, way_out = name_kind(line)
    if name:
        inside = " inside gzip data; unpack those first, then" if packed else ";"
        raise ValueError(f"{place}: expected one JSON object per line, found {name}{inside} "
                         f"{way_out}")
    return line


def parse_row(line: bytes, place: str) -> dict:
    """Parse a line's JSON object strictly; every failure is a `ValueError` that names the place.

    NaN and Infinity, as Python and pandas write them, pass: a reader that needs a text refuses
    them there.
    """
    if line.startswith(BOM):
        raise ValueError(f"{place}: expected UTF-8 without byte order mark inside the file, found "
                         "one: two files were joined; delete it")
    try:
        text = line.decode("utf-8")
        row = json.loads(text, object_pairs_hook=unique_keys, parse_int=short_int,
                         parse_float=finite_float, parse_constant=float)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not valid JSON: {line[error.start]:#x} at byte "
                         f"{error.start + 1} is no UTF-8; if it is Windows text, "
                         f"{convert_text('cp1252')}") from None
    except json.JSONDecodeError as error:
        around = text[max(0, error.pos - 12):error.pos + 12].strip()
        raise ValueError(f"{place}: not valid JSON: {error.msg} at character {error.pos + 1}, "
                         f"near {short(around)}") from None
    except RecursionError:
        raise ValueError(f"{place}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, found {short(row)}")
    return row
