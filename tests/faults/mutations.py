"""Does anything notice? Each safeguard of the store is removed in turn, in a copy, and a named test
must fail.

    python tests/faults/mutations.py             all of them, as a table
    python tests/faults/mutations.py fsync       those with `fsync` in their name

A mutation replaces one piece of source text that must occur exactly once: when the product changes,
mend it here.
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
LOCAL = "storage/local_files.py"
OBJECTS = "storage/object_files.py"
WRITER = "store/writer.py"
ARRAY = "store/array.py"
READER = "store/reader.py"
VIEW = "store/views.py"
TABLE = "store/table.py"
COMMIT = "store/records.py"
LAYOUT = "store/layout.py"
CUT = "faults/test_power.py::test_a_power_cut_at_any_call_loses_nothing_that_was_acknowledged"
KILL_CUT = "faults/test_power.py::test_a_power_cut_after_a_kill_and_a_resume_loses_nothing"
REMOVED = "faults/test_power.py::test_what_was_removed_does_not_come_back"
EDIT_CUT = "faults/test_power.py::test_a_power_cut_after_a_kill_of_an_edit_loses_nothing"
READ = "store/test_reader.py::"
SEEN = "store/test_views.py::"
WRITE = "store/test_writer.py::"
RECORDS = "store/test_records.py::"
PUT = "store/test_files.py::"
REMOTE = "store/test_object_files.py::"
DAMAGED = f"{READ}test_reading_what_a_damaged_object_belongs_to_raises_and_names_it"


@dataclass(frozen=True, kw_only=True)
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
PUT_BACK = """            if failed:
                raise DamagedError("""
MADE = "    if not files.put_if_absent(name, data) and files.read(name) != data:\n"
UNFINISHED = """    if not files.put_if_absent(name, data) and files.read(name) == data:
        return
    if files.read(name) != data:
"""

MUTATIONS = (
    # what is read
    Mutation(
        name="crc32c on load",
        file=ARRAY,
        old=CHUNK_CHECK,
        new="count != expected.bytes",
        test=DAMAGED,
    ),
    Mutation(
        name="crc32c of the record, not only of the file",
        file=ARRAY,
        old=CHUNK_CHECK,
        new="count != expected.bytes or stored != check",
        test=f"{READ}test_a_chunk_of_another_array_is_noticed",
    ),
    Mutation(
        name="length on load",
        file=ARRAY,
        old=CHUNK_CHECK,
        new=CHUNK_CHECK.split(" or ", 1)[1],
        test=f"{READ}test_a_longer_chunk_is_noticed_by_who_reads_one_shard",
    ),
    Mutation(
        name="table of arrays",
        file=READER,
        old='record.table != self.block_source["digest"]',
        new="False",
        test=f"{READ}test_an_array_of_the_store_of_another_table_is_refused",
    ),
    Mutation(
        name="hash of quarantine lists",
        file=ARRAY,
        old="content_hash(data) != commit.objects[name].blake3",
        new="False",
        test=DAMAGED,
    ),
    Mutation(
        name="hash of the table",
        file=TABLE,
        old='content_hash(objects[name]) != entry["blake3"]',
        new="False",
        test=DAMAGED,
    ),
    Mutation(
        name="table and source of one store",
        file=TABLE,
        old='record["digest"] != source["digest"]',
        new="False",
        test=f"{READ}test_a_pair_table_and_a_source_of_two_tables_are_refused",
    ),
    Mutation(
        name="records against the seal",
        file=ARRAY,
        old="digest_commits(commit_hashes) != sealed_digest",
        new="False",
        test=f"{READ}test_a_shard_of_another_table_with_its_record_is_refused",
    ),
    Mutation(
        name="records read after the seal",
        file=ARRAY,
        old="        return self._own_sealed\n",
        new="        return self.commits\n",
        test=f"{READ}test_an_array_opened_before_extraction_ended_is_not_served_with_holes",
    ),
    # what a record is
    Mutation(
        name="fingerprint of records",
        file=COMMIT,
        old="record.fingerprint != array.fingerprint.digest",
        new="False",
        test=f"{RECORDS}test_a_record_of_another_fingerprint_is_refused",
    ),
    Mutation(
        name="file name of records",
        file=COMMIT,
        old="name != commit_name(array.modality, array.name, record.shard)",
        new="False",
        test=f"{RECORDS}test_a_copy_of_another_shards_record_is_refused",
    ),
    Mutation(
        name="rows of records",
        file=COMMIT,
        old="or record.rows != (rows.start, rows.stop)",
        new="",
        test=TAKES_PLACE,
    ),
    Mutation(
        name="content hashes of records",
        file=COMMIT,
        old="or len(record.content) != len(rows)",
        new="",
        test=TAKES_PLACE,
    ),
    Mutation(
        name="sizes in records",
        file=COMMIT,
        old="or expected_sizes.items() - stored_sizes.items()",
        new="",
        test=TAKES_PLACE,
    ),
    Mutation(
        name="place of records",
        file=COMMIT,
        old='value.get("object") != name',
        new="False",
        test=f"{READ}test_a_record_in_the_place_of_another_is_refused",
    ),
    Mutation(
        name="checksum of records",
        file=COMMIT,
        old='content_hash(b"{" + data[stop + 2 :]).encode() != data[start:stop]',
        new="False",
        test=f"{RECORDS}test_a_record_that_says_something_else_than_what_was_committed_is_damaged",
    ),
    # how it is written
    Mutation(
        name="put if absent",
        file=LOCAL,
        old=LINK,
        new=(
            "            put = True\n            os.replace(temporary, self.path(name))\n         "
            "   temporary.touch()"
        ),
        test=f"{PUT}test_writing_replaces_and_creating_does_not",
    ),
    Mutation(
        name="fsync of an object that another has put",
        file=LOCAL,
        old="                put = False",
        new="                os.unlink(temporary)\n                return False",
        test=KILL_CUT,
    ),
    Mutation(
        name="fsync of folders found",
        file=LOCAL,
        old="folder in self._durable or not inside",
        new="True",
        test=KILL_CUT,
    ),
    Mutation(
        name="fsync of records before the seal",
        file=WRITER,
        old='        if hashes:\n            self.files.settle(f"{self._folder}/commits")\n',
        new="",
        test=KILL_CUT,
    ),
    Mutation(
        name="removal of what a kill left",
        file=WRITER,
        old='    files.remove_temporary("records", ZARR, VIEWS)\n',
        new="",
        test=f"{WRITE}test_zarr_does_not_stumble_over_what_a_killed_writer_left",
    ),
    Mutation(
        name="no removal while others write",
        file=LOCAL,
        old="if alone else ()",
        new="",
        test=f"{PUT}test_what_killed_writers_left_is_removed_but_not_while_somebody_writes",
    ),
    Mutation(
        name="removal after an error",
        file=LOCAL,
        old="            except BaseException:\n",
        new="            except ZeroDivisionError:\n",
        test=f"{PUT}test_an_interrupt_leaves_no_temporary_file",
    ),
    Mutation(
        name="read-back",
        file=WRITER,
        old=PUT_BACK,
        new=PUT_BACK.replace("failed", "False"),
        test=f"{WRITE}test_a_shard_that_does_not_read_back_as_written_is_not_committed",
    ),
    Mutation(
        name="look before writing",
        file=WRITER,
        old="            if self._committed_alike(record):\n",
        new="            if False:\n",
        test=f"{WRITE}test_a_shard_committed_with_other_bytes_is_refused_and_what_was_committed_stays",
    ),
    Mutation(
        name="one writer of an array at a time",
        file=WRITER,
        old='            self.files.exclusive(f"{self._folder}/commits"),\n',
        new="",
        test=f"{WRITE}test_a_writer_cannot_overwrite_a_shard_that_another_is_about_to_commit",
    ),
    Mutation(
        name="what was begun is finished",
        file=WRITER,
        old=MADE,
        new=UNFINISHED,
        test=KILL_CUT,
    ),
    Mutation(
        name="refusal of foreign folders",
        file=WRITER,
        old="    if strange and not files.exists(SOURCE):\n",
        new="    if False:\n",
        test=f"{WRITE}test_a_folder_of_something_else_is_refused_and_left_alone",
    ),
    Mutation(
        name="refusal of other tables",
        file=WRITER,
        old="    if differences:\n",
        new="    if False:\n",
        test=f"{WRITE}test_the_store_of_another_table_is_refused_with_the_difference",
    ),
    Mutation(
        name="fill value NaN",
        file=LAYOUT,
        old='fill_value=float("nan") if floating else 0',
        new="fill_value=0",
        test=f"{READ}test_a_shard_that_is_not_there_reads_as_nan_with_status_0_and_never_as_zeros",
    ),
    # views
    Mutation(
        name="fsync of a view's record that another has put",
        file=VIEW,
        old="    files.settle(VIEW_RECORDS)\n",
        new="",
        test=EDIT_CUT,
    ),
    Mutation(
        name="read-back of views",
        file=VIEW,
        old="if files.digest(name) != hashes[path]:",
        new="if False:",
        test=f"{SEEN}test_a_view_that_does_not_read_back_as_written_is_not_committed",
    ),
    Mutation(
        name="copy of a view's record",
        file=VIEW,
        old="and view_id not in _recorded(files)",
        new="and False",
        test=f"{SEEN}test_a_view_whose_record_is_lost_is_noticed",
    ),
    Mutation(
        name="rows of views",
        file=VIEW,
        old="if len(rows) and not (rows.min() >= -1 and rows.max() < n_rows):",
        new="if False:",
        test=f"{SEEN}test_rows_that_its_blocks_do_not_have_are_refused",
    ),
    Mutation(
        name="blocks of views",
        file=READER,
        old='opened.block_source["digest"] != block.digest',
        new="False",
        test=f"{SEEN}test_a_view_of_another_block_is_refused",
    ),
    Mutation(
        name="the old view stays the newest",
        file=READER,
        old="_open_segment(files, name) for name in names if not _is_view_only(files, name)",
        new="_open_segment(files, name) for name in names",
        test="faults/test_kill.py::test_a_kill_at_any_named_point_of_an_edit_loses_nothing",
    ),
    # on object storage
    Mutation(
        name="trial of put if absent",
        file=OBJECTS,
        old="        if not self.alone and not self.bucket.decides_creation(trial):\n",
        new="        if False:\n",
        test=f"{REMOTE}test_storage_without_put_if_absent_is_refused_before_anything_is_written",
    ),
    Mutation(
        name="a single writer looks before it puts",
        file=OBJECTS,
        old="            return self.read(name) == data\n",
        new="            raise FileNotFoundError\n",
        test=f"{REMOTE}test_a_single_writer_can_use_storage_without_put_if_absent",
    ),
)


def fsync_mutations() -> list[Mutation]:
    """Every fsync in storage/local_files.py: the line becomes `pass`."""
    source = (ROOT / "apecache" / LOCAL).read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    found = []
    for function in (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
    ):
        for node in ast.walk(function):
            if isinstance(node, ast.Expr) and ast.unparse(node).startswith(
                ("os.fsync(", "self._sync_folder(")
            ):
                begin = "".join(lines[function.lineno - 1 : node.lineno - 1])
                line = lines[node.lineno - 1]
                tests = {"settle": KILL_CUT, "remove": REMOVED, "remove_folder": REMOVED}
                test = tests.get(function.name, CUT)
                name = f"fsync in {function.name}"
                found.append(
                    Mutation(
                        name=name,
                        file=LOCAL,
                        old=begin + line,
                        new=begin + line.replace(line.strip(), "pass"),
                        test=test,
                    )
                )
    return found


@contextmanager
def mutated(mutation: Mutation) -> Iterator[Path]:
    """A copy of the package and of its tests with the mutation applied."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copy(ROOT / "pyproject.toml", copy)
        for name in ("apecache", "benchmarks", "tests/store", "tests/faults", "tests/support"):
            shutil.copytree(
                ROOT / name,
                copy / name,
                ignore=shutil.ignore_patterns("__pycache__", "results"),
            )
        for path in (ROOT / "tests").glob("*.py"):
            if not path.name.startswith("test_"):
                shutil.copy(path, copy / "tests")
        target = copy / "apecache" / mutation.file
        source = target.read_text(encoding="utf-8")
        if source.count(mutation.old) != 1:
            raise LookupError(
                f"{mutation.name}: its text occurs {source.count(mutation.old)} times in "
                f"{mutation.file}"
            )
        target.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        yield copy


def survives(mutation: Mutation) -> str:
    """Empty if the named test fails, as it must; else what happened."""
    with mutated(mutation) as copy:
        # -P and PYTHONPATH: the copy, and not the checkout that is installed.
        # A folder of its own: pytest clears away those of other runs, and many run at the same
        # time.
        options = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={copy}/temporary"]
        command = [sys.executable, "-P", "-m", "pytest", *options, f"tests/{mutation.test}"]
        environment = {**os.environ, "PYTHONPATH": str(copy), "APECACHE_FAULTS": ""}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return (
        ""
        if done.returncode == 1
        else (
            f"{mutation.name}: pytest ended with {done.returncode}: "
            f"{done.stdout[-400:]}{done.stderr[-400:]}"
        )
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
