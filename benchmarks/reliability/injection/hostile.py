"""Files that somebody wrote to do harm: manifests, stores, recipes and heads, changed so that every
checksum fits.

Whatever is in them: an error of ours on one line or a result, no code run, no network, no file
outside opened, no process started, no memory without end. As a program (`python -m
benchmarks.reliability.injection.hostile FOLDER COUNT SEED`) it puts an audit hook over all of it,
which cannot be taken off again, and prints what went wrong as JSON.
"""

import json
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reliability.injection.program import program_command, program_environment

FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.",
    "ctypes.dlopen",
)
FORBIDDEN += ("import", "exec", "compile", "urllib.", "ftplib.", "smtplib.", "shutil.")
SPARE_BYTES = 2 << 30
STRANGE = (
    None, True, -1, 0, 2, 2**31, 2**63, 10**30, 1.5, float("1e308"), "", "x", "../../../etc/passwd", "/dev/zero", "\0",
    "a\nb", "\ud800", "__import__('os').system('id')", [], {}, [[]], [1, 2], {"a": 1}, "x" * 5000,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Attempts by kind of file, those that were refused, and what must not have happened."""

    tried: Counter[str]
    refused: Counter[str]
    wrong: list[str]


def hostile_files(folder: Path, count: int, seed: int) -> Outcome:
    """Run the attempts in a process of their own."""
    done = subprocess.run(
        program_command("hostile", str(folder), str(count), str(seed)),
        env=program_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return Outcome(
            tried=Counter(),
            refused=Counter(),
            wrong=[f"the process ended with {done.returncode}: {done.stderr[-2000:]}"],
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    return Outcome(
        tried=Counter(answer["tried"]),
        refused=Counter(answer["refused"]),
        wrong=answer["wrong"],
    )


# --- changes --------------------------------------------------------------------------------------


def changed_json(value: Any, chance: random.Random) -> Any:
    """The value with one of its leaves or branches replaced, removed, or doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        match chance.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, str(chance.choice(STRANGE))[:50]: value[key]}
            case _:
                return {**value, key: changed_json(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        place = chance.randrange(len(value))
        return [*value[:place], changed_json(value[place], chance), *value[place + 1 :]]
    if chance.random() < 0.05:
        return nested(chance.choice((50, 300)))
    return chance.choice(STRANGE)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """A few bytes replaced, a piece doubled or taken out, or the head of it alone."""
    place = chance.randrange(len(data) + 1)
    length = chance.randrange(1, 20)
    match chance.randrange(5):
        case 0:
            return data[:place] + chance.randbytes(length) + data[place + length :]
        case 1:
            return data[:place] + data[place + length :]
        case 2:
            return (
                data[:place] + data[place : place + length] * chance.randrange(2, 50) + data[place:]
            )
        case 3:
            return data[:place]
        case _:
            return data[:place] + chance.choice(
                (b'"', b"\t", b"\n", b",", b"\0", b"\xff", b"{", b"[" * 3000)
            )


# --- attempts -------------------------------------------------------------------------------------

Files = dict[str, bytes]
Attempt = tuple[Files, Callable[[], object]]
"""Files to put below the folder for this attempt, and what a user would do with them."""


class Attacks:
    """Made from sound examples; `attempt` changes one of them. Nothing here is imported after the
    hook is armed."""

    def __init__(self, folder: Path) -> None:
        from benchmarks.reliability.injection.tower import SMALL, run, tree

        self.folder = folder
        run(folder / "store", SMALL)
        self.store = {f"store/{name}": data for name, data in tree(folder / "store").items()}
        self.heads, self.manifests = self._write_heads(), self._write_manifests()
        self.kinds: Mapping[str, Callable[[random.Random], Attempt]] = {
            "manifest": self.manifest,
            "store": self.stored_record,
            "recipe": self.recipe,
            "head": self.head,
        }

    def _write_heads(self) -> Files:
        import torch

        from apecache.encoders.spec import EncoderSpec
        from apecache.fingerprint import Fingerprint
        from apecache.heads.build import build_heads
        from apecache.heads.head import HeadSpec
        from apecache.runs.heads import TrainedHeads, TrainedSide, save_heads
        from benchmarks.reliability.injection.tower import tree

        torch.manual_seed(0)
        pair = build_heads(
            HeadSpec(dim=4),
            text=HeadSpec(kind="mlp", width=3, depth=1),
            image_dim=6,
            text_dim=5,
        )
        specs = (vars(EncoderSpec("timm", "vit", "image")), vars(EncoderSpec("hf", "bert", "text")))
        sides = [
            TrainedSide(head=head, encoder=spec, fingerprint=Fingerprint(fields={"weights": "x"}))
            for head, spec in zip(pair, specs, strict=True)
        ]
        save_heads(TrainedHeads(*sides, 14.0, {"seed": 0}), self.folder / "run")
        return {f"run/{name}": data for name, data in tree(self.folder / "run").items()}

    def attempt(self, kind: str, chance: random.Random) -> Attempt:
        return self.kinds[kind](chance)

    def manifest(self, chance: random.Random) -> Attempt:
        """Tables and annotation files as text, Parquet and tar as bytes."""
        from apecache.data.sources import open_pairs

        name = chance.choice(sorted(self.manifests))
        data = self.manifests[name]
        if name.endswith(".json") and chance.random() < 0.5:
            data = json.dumps(changed_json(json.loads(data), chance)).encode(
                "utf-8",
                "surrogatepass",
            )
        elif name.endswith(".jsonl") and chance.random() < 0.5:
            lines = [json.loads(line) for line in data.splitlines()]
            lines[chance.randrange(len(lines))] = changed_json(lines[0], chance)
            data = b"\n".join(json.dumps(line).encode("utf-8", "surrogatepass") for line in lines)
        else:
            data = changed_bytes(data, chance)
        return {name: data}, lambda: open_pairs(self.folder / name).captions

    @staticmethod
    def _write_manifests() -> Files:
        """A small one of every kind that is one file."""
        import io
        import tarfile

        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {"image": f"images/{i}.jpg", "caption": f"caption {i}", "split": "train"}
            for i in range(6)
        ]
        names = list(rows[0])
        lines = [names, *([row[name] for name in names] for row in rows)]
        karpathy = [
            {
                "filename": row["image"],
                "split": "restval",
                "sentences": [{"raw": row["caption"]}],
                "imgid": number,
            }
            for number, row in enumerate(rows)
        ]
        coco = {
            "images": [
                {"id": number, "file_name": row["image"]} for number, row in enumerate(rows)
            ],
            "annotations": [
                {"image_id": number, "caption": row["caption"]} for number, row in enumerate(rows)
            ],
        }
        parquet = io.BytesIO()
        tar = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), parquet)
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for number in range(3):
                for ending, data in ((".jpg", b"x" * 40), (".txt", b"a caption")):
                    member = tarfile.TarInfo(f"{number:05d}{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return {
            "pairs.tsv": "\n".join("\t".join(line) for line in lines).encode(),
            "pairs.csv": "\n".join(",".join(line) for line in lines).encode(),
            "pairs.jsonl": "\n".join(json.dumps(row) for row in rows).encode(),
            "karpathy.json": json.dumps({"images": karpathy, "dataset": "x"}).encode(),
            "coco.json": json.dumps(coco).encode(),
            "pairs.parquet": parquet.getvalue(),
            "pairs.tar": tar.getvalue(),
            "captions.txt": b"one\ntwo\n",
        }

    def stored_record(self, chance: random.Random) -> Attempt:
        """A record, or one of Zarr's descriptions, changed and sealed again, with all that depends
        on it."""
        from benchmarks.reliability.injection.damage import things

        names = [name for name in sorted(self.store) if name.endswith((".json", ".jsonl"))]
        name = chance.choice(names)
        files = {name: changed_record(name, self.store[name], chance)}
        follow(files, self.store)

        return files, lambda: all_of(
            *(read for _, read in things(self.folder / "store")),
            self._verify,
        )

    def _verify(self) -> object:
        from apecache.store.verify import verify_store

        return verify_store(self.folder / "store", threads=1)

    def recipe(self, chance: random.Random) -> Attempt:
        from apecache.recipes.recipe import load_recipe, zoo_names

        name = chance.choice(zoo_names())
        text = load_recipe(name).model_dump(mode="json")
        if chance.random() < 0.6:
            text = changed_json(text, chance)
            data = "\n".join(toml_lines(text)).encode("utf-8", "surrogatepass")
        else:
            data = changed_bytes("\n".join(toml_lines(text)).encode(), chance)
        return {"recipe.toml": data}, lambda: load_recipe(str(self.folder / "recipe.toml"))

    def head(self, chance: random.Random) -> Attempt:
        from apecache.encoders.spec import spec_from_json
        from apecache.runs.heads import load_heads

        if chance.random() < 0.7:
            value = changed_json(json.loads(self.heads["run/head.json"]), chance)
            files = {"run/head.json": json.dumps(value).encode()}
        else:
            files = {
                "run/head.safetensors": changed_bytes(self.heads["run/head.safetensors"], chance)
            }

        def use() -> None:
            heads = load_heads(self.folder / "run")
            sides = (heads.image, heads.text)
            all_of(
                *(lambda side=side: spec_from_json(side.encoder) for side in sides),
                lambda: heads.digest,
            )

        return files, use

    @property
    def sound(self) -> Files:
        return {**self.store, **self.heads}


def changed_record(name: str, data: bytes, chance: random.Random) -> bytes:
    from apecache.store.records import with_checksum

    if name.endswith(".jsonl"):
        return changed_bytes(data, chance)
    value = json.loads(data)
    sealed = value.pop("checksum", None) if isinstance(value, dict) else None
    changed = changed_json(value, chance)
    if sealed is None or not isinstance(changed, dict):
        return json.dumps(changed).encode("utf-8", "surrogatepass")
    try:
        return with_checksum(changed)
    except (ValueError, TypeError, RecursionError):
        return data


def follow(files: Files, store: Files) -> None:
    """Give every record that names a changed object the hash that it has now, and seal it again, up
    to the top."""
    from apecache.fingerprint import content_hash
    from apecache.store.records import digest_commits, with_checksum

    name = next(iter(files))
    for holder, data in store.items():
        if holder == name or not holder.endswith(".json") or "/records/" not in holder:
            continue
        value = json.loads(data)
        inside = name.removeprefix("store/")
        if inside in value.get("objects", {}):
            value.pop("checksum")
            value["objects"][inside] |= {
                "blake3": content_hash(files[name]),
                "bytes": len(files[name]),
            }
            files[holder] = with_checksum(value)
    for seal in [holder for holder in store if holder.endswith("seal.json")]:
        folder = seal.removesuffix("seal.json") + "commits/"
        commits = sorted(holder for holder in store if holder.startswith(folder))
        if any(commit in files for commit in commits) and seal not in files:
            value = json.loads(store[seal])
            value.pop("checksum")
            value["digest"] = digest_commits(
                content_hash(files.get(commit, store[commit])) for commit in commits
            )
            files[seal] = with_checksum(value)


def toml_lines(value: Any) -> list[str]:
    """Roughly TOML: values as JSON writes them; what is no table is written all the same."""
    if not isinstance(value, dict):
        return [json.dumps(value)]
    plain = [
        f"{key} = {json.dumps(item)}"
        for key, item in value.items()
        if not isinstance(item, dict) and item is not None
    ]
    tables = [(key, item) for key, item in value.items() if isinstance(item, dict)]
    inner = [line for key, item in tables for line in (f"[{key}]", *toml_lines(item))]
    return [*plain, *inner]


# --- the process ----------------------------------------------------------------------------------


def all_of(*reads: Callable[[], object]) -> None:
    """Everything is tried, whatever is refused; then the first refusal is raised."""
    from apecache.errors import ApecacheError

    refusals: list[ApecacheError] = []
    for read in reads:
        try:
            read()
        except ApecacheError as error:
            require_one_line(error)
            refusals.append(error)
    if refusals:
        raise refusals[0]


def require_one_line(error: BaseException) -> None:
    if "\n" in str(error):
        raise AssertionError(f"a message of several lines: {str(error)[:200]!r}")


def watch(folder: Path, seen: list[str]) -> Callable[[bool], None]:
    """Put up the hook; the function that is returned arms and disarms it."""
    armed = [False]
    inside = str(folder.resolve())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not armed[0]:
            return
        if event.startswith(FORBIDDEN):
            seen.append(f"{event} {str(arguments)[:200]}")
        elif (
            event == "open"
            and isinstance(arguments[0], str)
            and not os.path.realpath(arguments[0]).startswith(inside)
        ):
            seen.append(f"open {arguments[0]}")

    sys.addaudithook(hook)

    def arm(value: bool) -> None:
        armed[0] = value

    return arm


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(folder: Path, count: int, seed: int) -> Outcome:
    from apecache.errors import ApecacheError

    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    attacks = Attacks(folder)
    seen = list[str]()
    outcome = Outcome(tried=Counter(), refused=Counter(), wrong=[])
    arm = watch(folder, seen)
    # the first attempts import what is imported late; they are judged like all others, the hook is
    # not up
    warm = 40
    for number in range(count + warm):
        if number == warm:
            limit_memory()
        kind = chance.choice(sorted(attacks.kinds))
        files, use = attacks.attempt(kind, chance)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        seen.clear()
        problem = ""
        arm(number >= warm)
        try:
            use()
        except ApecacheError as error:
            problem = (
                f"a message of several lines: {str(error)[:200]!r}" if "\n" in str(error) else ""
            )
            outcome.refused[kind] += 1
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
        arm(False)
        outcome.tried[kind] += 1
        for trouble in filter(None, (problem, *seen[:1])):
            outcome.wrong.append(f"{number}: {kind} {', '.join(files)}: {trouble[:300]}")
        for name in files:
            if name in attacks.sound:
                (folder / name).write_bytes(attacks.sound[name])
            else:
                (folder / name).unlink()
    return outcome


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(
        json.dumps({"tried": found.tried, "refused": found.refused, "wrong": found.wrong}) + "\n"
    )
