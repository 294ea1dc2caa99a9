"""Does anything notice? Each safeguard of the store is removed in turn, in a copy, and a named test must fail.

    python tests/faults/mutations.py             all of them, as a table
    python tests/faults/mutations.py fsync       those with `fsync` in their name

A mutation replaces one piece of source text that must occur exactly once: when the product changes, mend it here.
"""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCAL = "storage/local.py"
OBJECTS = "storage/object_files.py"
WRITER = "store/writer.py"
ARRAY = "store/array.py"
READER = "store/reader.py"
TABLE = "store/table.py"
COMMIT = "store/records.py"
LAYOUT = "store/layout.py"
CUT = "faults/test_power.py::test_a_power_cut_at_any_call_loses_nothing_that_was_acknowledged"
KILL_CUT = "faults/test_power.py::test_a_power_cut_after_a_kill_and_a_resume_loses_nothing"
REMOVED = "faults/test_power.py::test_what_was_removed_does_not_come_back"
READ = "store/test_reader.py::"
WRITE = "store/test_writer.py::"
RECORDS = "store/test_records.py::"
PUT = "store/test_files.py::"
REMOTE = "store/test_object_files.py::"
DAMAGED = f"{READ}test_reading_what_a_damaged_object_belongs_to_raises_and_names_it"


@dataclass(frozen=True)
class Mutation:
    """In `file` of apecache/, `old` becomes `new`; then `test` (below tests/) must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


CHUNK_CHECK = "count != expected.bytes or check != expected.crc32c or stored != check"
TAKES_PLACE = f"{RECORDS}test_a_valid_record_that_is_not_of_its_place_is_refused"
LINK = """            try:
                os.link(temporary, self.path(name))
            except FileExistsError:
                put = False"""
PUT_BACK = """        self.files.write(name, *payload)
        if not self._stands(name, wanted):"""
MADE = "    if not files.create(name, data) and files.read(name) != data:\n"
UNFINISHED = """    if not files.create(name, data) and files.read(name) == data:
        return
    if files.read(name) != data:
"""

MUTATIONS = (
    # what is read
    Mutation("crc32c on load", ARRAY, CHUNK_CHECK, "count != expected.bytes", DAMAGED),
    Mutation(
        "crc32c of the record, not only of the file",
        ARRAY,
        CHUNK_CHECK,
        "count != expected.bytes or stored != check",
        f"{READ}test_a_chunk_of_another_array_is_noticed",
    ),
    Mutation(
        "length on load",
        ARRAY,
        CHUNK_CHECK,
        CHUNK_CHECK.split(" or ", 1)[1],
        f"{READ}test_a_longer_chunk_is_noticed_by_who_reads_one_shard",
    ),
    Mutation(
        "table of arrays",
        READER,
        'record.table != self.source["digest"]',
        "False",
        f"{READ}test_an_array_of_the_store_of_another_table_is_refused",
    ),
    Mutation("hash of quarantine lists", ARRAY, "content_hash(data) != commit.objects[name].blake3", "False", DAMAGED),
    Mutation("hash of the table", TABLE, 'content_hash(objects[name]) != entry["blake3"]', "False", DAMAGED),
    Mutation(
        "table and source of one store",
        TABLE,
        'record["digest"] != source["digest"]',
        "False",
        f"{READ}test_a_pair_table_and_a_source_of_two_tables_are_refused",
    ),
    Mutation(
        "records against the seal",
        ARRAY,
        "digest_commits(found) != wanted",
        "False",
        f"{READ}test_a_shard_of_another_table_with_its_record_is_refused",
    ),
    Mutation(
        "records read after the seal",
        ARRAY,
        "        return self._own_sealed\n",
        "        return self.commits\n",
        f"{READ}test_an_array_opened_before_extraction_ended_is_not_served_with_holes",
    ),
    # what a record is
    Mutation(
        "fingerprint of records",
        COMMIT,
        "record.fingerprint != array.fingerprint.digest",
        "False",
        f"{RECORDS}test_a_record_of_another_fingerprint_is_refused",
    ),
    Mutation(
        "file name of records",
        COMMIT,
        "name != commit_name(array.modality, array.name, record.shard)",
        "False",
        f"{RECORDS}test_a_copy_of_another_shards_record_is_refused",
    ),
    Mutation("rows of records", COMMIT, "or record.rows != (rows.start, rows.stop)", "", TAKES_PLACE),
    Mutation("content hashes of records", COMMIT, "or len(record.content) != len(rows)", "", TAKES_PLACE),
    Mutation("sizes in records", COMMIT, "or wanted.items() - sizes.items()", "", TAKES_PLACE),
    Mutation(
        "place of records",
        COMMIT,
        'value.get("object") != name',
        "False",
        f"{READ}test_a_record_in_the_place_of_another_is_refused",
    ),
    Mutation(
        "checksum of records",
        COMMIT,
        'content_hash(b"{" + data[stop + 2 :]).encode() != data[start:stop]',
        "False",
        f"{RECORDS}test_a_record_that_says_something_else_than_what_was_committed_is_damaged",
    ),
    # how it is written
    Mutation(
        "put if absent",
        LOCAL,
        LINK,
        "            put = True\n            os.replace(temporary, self.path(name))\n            temporary.touch()",
        f"{PUT}test_writing_replaces_and_creating_does_not",
    ),
    Mutation(
        "fsync of an object that another has put",
        LOCAL,
        "                put = False",
        "                os.unlink(temporary)\n                return False",
        KILL_CUT,
    ),
    Mutation("fsync of folders found", LOCAL, "folder in self._durable or not inside", "True", KILL_CUT),
    Mutation(
        "fsync of records before the seal",
        WRITER,
        '        self.files.settle(f"{self._folder}/commits")\n',
        "",
        KILL_CUT,
    ),
    Mutation(
        "removal of what a kill left",
        WRITER,
        '    files.remove_temporary("records", ZARR)\n',
        "",
        f"{WRITE}test_zarr_does_not_stumble_over_what_a_killed_writer_left",
    ),
    Mutation(
        "no removal while others write",
        LOCAL,
        "if alone else ()",
        "",
        f"{PUT}test_what_killed_writers_left_is_removed_but_not_while_somebody_writes",
    ),
    Mutation(
        "removal after an error",
        LOCAL,
        "            except BaseException:\n",
        "            except ZeroDivisionError:\n",
        f"{PUT}test_an_interrupt_leaves_no_temporary_file",
    ),
    Mutation(
        "read-back",
        WRITER,
        PUT_BACK,
        PUT_BACK.replace("not self._stands(name, wanted)", "False"),
        f"{WRITE}test_a_shard_that_does_not_read_back_as_written_is_not_committed",
    ),
    Mutation(
        "look before writing",
        WRITER,
        "            committed = self._committed_alike(record)\n",
        "            committed = False\n",
        f"{WRITE}test_a_shard_committed_with_other_bytes_is_refused_and_what_was_committed_stays",
    ),
    Mutation(
        "one writer of an array at a time",
        WRITER,
        '        with self.files.exclusive(f"{self._folder}/commits"):\n',
        "        if True:\n",
        f"{WRITE}test_a_writer_cannot_overwrite_a_shard_that_another_is_about_to_commit",
    ),
    Mutation("what was begun is finished", WRITER, MADE, UNFINISHED, KILL_CUT),
    Mutation(
        "refusal of foreign folders",
        WRITER,
        "    if strange and not files.exists(SOURCE):\n",
        "    if False:\n",
        f"{WRITE}test_a_folder_of_something_else_is_refused_and_left_alone",
    ),
    Mutation(
        "refusal of other tables",
        WRITER,
        "    if differences:\n",
        "    if False:\n",
        f"{WRITE}test_the_store_of_another_table_is_refused_with_the_difference",
    ),
    Mutation(
        "fill value NaN",
        LAYOUT,
        'fill_value=float("nan") if floating else 0',
        "fill_value=0",
        f"{READ}test_a_shard_that_is_not_there_reads_as_nan_with_status_0_and_never_as_zeros",
    ),
    # on object storage
    Mutation(
        "trial of put if absent",
        OBJECTS,
        "        if not self.alone and not self.bucket.decides_creation(trial):\n",
        "        if False:\n",
        f"{REMOTE}test_storage_without_put_if_absent_is_refused_before_anything_is_written",
    ),
    Mutation(
        "a single writer looks before it puts",
        OBJECTS,
        "            return self.read(name) == data\n",
        "            raise FileNotFoundError\n",
        f"{REMOTE}test_a_single_writer_can_use_storage_without_put_if_absent",
    ),
)


def fsync_mutations() -> list[Mutation]:
    """Every fsync in storage/local.py: the line becomes `pass`."""
    source = (ROOT / "apecache" / LOCAL).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    found = []
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Expr) and ast.unparse(node).startswith(("os.fsync(", "self._sync_folder(")):
                begin, line = "".join(lines[function.lineno - 1 : node.lineno - 1]), lines[node.lineno - 1]
                test = {"settle": KILL_CUT, "remove": REMOVED}.get(function.name, CUT)
                name = f"fsync in {function.name}"
                found.append(Mutation(name, LOCAL, begin + line, begin + line.replace(line.strip(), "pass"), test))
    return found


@contextmanager
def mutated(mutation: Mutation) -> Iterator[Path]:
    """A copy of the package and of its tests with the mutation applied."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for name in ("apecache", "tests/store", "tests/faults", "tests/support"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (ROOT / "tests").glob("*.py"):
            if not path.name.startswith("test_"):
                shutil.copy(path, copy / "tests")
        target = copy / "apecache" / mutation.file
        source = target.read_text(encoding="utf-8")
        if source.count(mutation.old) != 1:
            raise LookupError(f"{mutation.name}: its text occurs {source.count(mutation.old)} times in {mutation.file}")
        target.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        yield copy


def survives(mutation: Mutation) -> str:
    """Empty if the named test fails, as it must; else what happened."""
    with mutated(mutation) as copy:
        # -P and PYTHONPATH: the copy, and not the checkout that is installed.
        # A folder of its own: pytest clears away those of other runs, and many run at the same time.
        options = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={copy}/temporary"]
        command = [sys.executable, "-P", "-m", "pytest", *options, f"tests/{mutation.test}"]
        environment = {**os.environ, "PYTHONPATH": str(copy), "APECACHE_FAULTS": ""}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return (
        ""
        if done.returncode == 1
        else f"{mutation.name}: pytest ended with {done.returncode}: {done.stdout[-400:]}{done.stderr[-400:]}"
    )


def survivors(pattern: str = "", jobs: int = 2) -> tuple[int, list[str]]:
    """How many mutations were tried, and those that no test noticed."""
    chosen = [mutation for mutation in (*MUTATIONS, *fsync_mutations()) if pattern in mutation.name]
    with ThreadPoolExecutor(jobs) as pool:
        return len(chosen), [text for text in pool.map(survives, chosen) if text]


if __name__ == "__main__":
    tried, alive = survivors(*sys.argv[1:2])
    sys.stdout.write("\n".join([*alive, f"{tried} mutations, {len(alive)} unnoticed"]) + "\n")
    sys.exit(bool(alive))
