"""The pages in a real browser: hostile texts stay texts and break no layout, the keyboard is
enough, nothing is loaded.

Skipped where there is no Chromium on the PATH.
"""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browser, executable
from pages import HOSTILE, page_of, shown
from PIL import Image
from tiny import draw_shape, extract_tiny

from apecache.data.media import FolderMedia
from apecache.report.charts.parallel import Axis, Parallel
from apecache.report.page import Page, write_page
from apecache.report.report_page import ReportSpec, report_page
from apecache.report.sweep_page import sweep_page
from apecache.search.index import build_index
from apecache.store.reader import FeatureStore
from apecache.sweeps.run import Trial

pytestmark = [
    pytest.mark.skipif(executable() is None, reason="there is no chromium on the PATH"),
    pytest.mark.slow,
]

WIDTHS = (1280, 390)
SCRIPTS = """JSON.stringify([
  document.querySelectorAll('script, iframe, object, embed, base, form[action*="evil"]').length,
  [...document.querySelectorAll('*')].filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).length,
  typeof window.hurt,
  document.documentElement.scrollWidth - document.documentElement.clientWidth,
  [...document.querySelectorAll('body *')].filter(e => {
    const r = e.getBoundingClientRect();
    if (r.right <= document.documentElement.clientWidth + 1 || r.width === 0) return false;
    for (let p = e.parentElement; p; p = p.parentElement)
      if (['auto', 'hidden', 'scroll'].includes(getComputedStyle(p).overflowX)) return false;
    return true;
  }).map(e => e.tagName + '.' + e.className).slice(0, 5)])"""
NAMES = [
    "<img src=x onerror=window.hurt=1>.png", '"><script>window.hurt=1<!---->.png', "'onload='window.hurt=1.png",
    "&lt;script&gt;window.hurt=1&lt;.png", "\u202egnp.exe.png", "a" * 200 + ".png", "javascript:window.hurt=1.png",
    "{{ 7 * 7 }}.png", "=HYPERLINK(x).png", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d.png",
    "%2e%2e%2fetc.png",
    "data:text&html,<script>.png", "--><script>window.hurt=1.png", "]]><svg onload=window.hurt=1>.png",
    "\U0001f415\u200d\U0001f9ba.png",
]  # fmt: skip


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """30 hostile captions that a store can keep."""
    kept = [text.replace("alert(1)", "window.hurt=1") for text in HOSTILE]
    return [
        text for text in kept if text.strip() and not any(0xD800 <= ord(c) <= 0xDFFF for c in text)
    ][:30]


@pytest.fixture(scope="module")
def hostile(
    captions: list[str],
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A folder of images with hostile names and captions, and their store."""
    folder = tmp_path_factory.mktemp("hostile")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as table:
        for number, caption in enumerate(captions):
            name = NAMES[number % len(NAMES)] if number < len(NAMES) else f"{number}.png"
            draw_shape(
                ("red", "blue", "green")[number % 3],
                ("circle", "square")[number % 2],
            ).rotate(number).save(folder / name)
            split = "val" if number % 2 else "train"
            table.write(json.dumps({"image": name, "caption": caption, "split": split}) + "\n")
    extract_tiny(
        folder / "pairs.jsonl",
        store=folder / "store",
        image=tiny_image_encoder,
        text=tiny_text_encoder,
    )
    return folder, folder / "store"


def look(window: Browser, url: str, width: int, dark: bool = False) -> None:
    """Open a page and see that it is inert and fits."""
    window.resize(width, dark=dark)
    window.open(url)
    found = json.loads(window.run(SCRIPTS))
    assert found[:3] == [0, 0, "undefined"], url
    assert found[3:] == [0, []], (url, width)
    entries = [
        event["params"]["entry"]
        for event in window.events
        if event.get("method") == "Log.entryAdded"
    ]
    told = [
        entry for entry in entries if entry.get("url") != window.run("location.href")
    ]  # its own status 400 or 404
    assert not told, told[:3]


def requested(window: Browser) -> set[str]:
    sent = [
        e["params"]["request"]["url"]
        for e in window.events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    return {
        url.split(":", 1)[0] if not url.startswith("http") else url.split("/")[2] for url in sent
    }


# --- pages in files -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_every_place_for_text_keeps_hostile_texts_inert_and_within_the_window(
    window: Browser,
    tmp_path: Path,
    width: int,
) -> None:
    texts = [text.replace("alert(1)", "window.hurt=1") for text in HOSTILE]
    parts = [page_of(text) for text in texts]
    axes = tuple(
        Axis(name=text, kind="choice", values=(text, None), options=(text, "b")) for text in texts
    )
    whole = Page(
        title=texts[0],
        tables=tuple(table for part in parts for table in part.tables),
        parallels=(Parallel(title=texts[1], note=texts[2], axes=axes, scores=(1.0, 2.0)),),
        charts=tuple(chart for part in parts for chart in part.charts),
        galleries=tuple(gallery for part in parts for gallery in part.galleries),
        notes=tuple(texts),
    )
    page = write_page(replace(whole, commands=tuple(texts)), tmp_path / "page.html")
    look(window, page.as_uri(), width)
    assert requested(window) <= {"file", "data"}


@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_of_hostile_captions_and_file_names(
    window: Browser,
    hostile: tuple[Path, Path],
    tiny_run: Path,
    tmp_path: Path,
    width: int,
) -> None:
    folder, store = hostile
    spec = ReportSpec(
        FeatureStore.open(store),
        "val",
        FolderMedia(root=folder),
        n_items=20,
        device="cpu",
    )
    page = report_page([tiny_run], tmp_path / "report.html", spec)
    look(window, page.as_uri(), width, dark=width == 390)
    assert window.run("document.querySelectorAll('article').length") >= 15
    assert window.run("[...document.images].every(i => i.naturalWidth > 0)")
    assert requested(window) <= {"file", "data"}


@pytest.mark.parametrize("width", WIDTHS)
def test_a_sweep_of_hostile_settings(
    window: Browser,
    captions: list[str],
    tmp_path: Path,
    width: int,
) -> None:
    rng = np.random.default_rng(0)
    trials = []
    for number, text in enumerate(captions):
        values = {"recipe": text, "lr": float(10 ** rng.uniform(-4, -1)), text: text}
        score = float(rng.uniform(20, 60))
        trials.append(
            Trial(
                number=number,
                recipe=text,
                settings=(text,),
                values=values,
                state="done",
                epochs=9,
                recalls=(score,),
                mean=score,
                low=None,
                high=None,
                error="",
            )
        )
    trials.append(
        Trial(
            number=99,
            recipe=captions[0],
            settings=(),
            values={},
            state="failed",
            error=captions[1],
        )
    )
    dimensions = {"recipe": {"choice": captions}, "lr": {"log": [1e-4, 1e-1]}} | {
        t: {"choice": [t]} for t in captions
    }
    described = {
        "space": dimensions,
        "recipes": {text: {} for text in captions},
        "sampler": captions[2],
    }
    (tmp_path / "sweep.json").write_text(json.dumps(described))
    (tmp_path / "trials.jsonl").write_text(
        "".join(json.dumps(vars(trial)) + "\n" for trial in trials)
    )
    (tmp_path / "command.txt").write_text(captions[0] * 30)
    look(window, sweep_page(tmp_path).as_uri(), width, dark=width == 1280)
    assert window.run("document.querySelectorAll('path.trial').length") == len(captions)
    assert window.run("document.querySelectorAll('path.best').length") == 1


# --- the search page ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(
    hostile: tuple[Path, Path],
    tiny_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    from apecache.report.serve import ServeSpec, make_server

    index = tmp_path_factory.mktemp("browser") / "index"
    build_index(tiny_run, FeatureStore.open(hostile[1]), index)
    server, sockets, url = make_server(ServeSpec(index, port=0, device="cpu"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield url
    server.should_exit = True
    thread.join(30)
    sockets[0].close()


@pytest.mark.parametrize("width", WIDTHS)
def test_searching_hostile_captions_and_file_names(
    window: Browser,
    address: str,
    captions: list[str],
    width: int,
) -> None:
    from urllib.parse import quote

    for query in (
        "",
        "?q=shape&k=30",
        "?like=0&like=1&k=30&target=captions",
        "?q=",
        "?q=a&k=999",
        "nothing",
    ):
        look(window, address + query, width, dark="like" in query)
    assert requested(window) == {address.split("/")[2]}
    for caption in captions:
        look(window, f"{address}?q={quote(caption[:1500])}&k=3", width)
        assert window.run("document.getElementById('q').value") == shown(caption[:1500])
    window.open(f"{address}?q=shape&k=30")
    assert window.run("document.images.length") == 30
    assert window.run("[...document.images].every(i => i.loading === 'lazy' || i.naturalWidth > 0)")


def test_the_keyboard_is_enough(window: Browser, address: str) -> None:
    window.resize(1280)
    window.open(address)
    assert window.run("document.activeElement.id") == "q"
    window.type("a red circle")
    window.press("Enter", "\r")
    window.wait("Page.loadEventFired")
    assert window.run("location.search").startswith("?q=a+red+circle")
    assert window.run("document.querySelectorAll('.results li').length") > 0
    window.run("document.activeElement.blur(); scrollTo(0, 0)")
    seen = []
    for _ in range(16):
        window.press("Tab")
        seen.append(
            window.run("document.activeElement.id || document.activeElement.textContent.trim()")
        )
        assert window.run("getComputedStyle(document.activeElement).outlineStyle") != "none", seen
    assert seen[0] == "To the results"
    assert [name for name in seen if name in ("q", "image", "not", "target", "k", "Search")][:1]
    first = next(i for i, name in enumerate(seen) if name.startswith("like this"))
    for _ in range(15 - first):
        window.press("Tab", shift=True)
    assert window.run("document.activeElement.textContent").startswith("like this")
    window.forget()
    window.press("Enter", "\r")
    window.wait("Page.loadEventFired")
    assert "like=" in window.run("location.search")
    assert window.run("document.querySelectorAll('input[name=like]:checked').length") == 1


def test_an_image_that_is_chosen_is_searched_for(
    window: Browser,
    address: str,
    tmp_path: Path,
) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "<script>window.hurt=1<.png")
    window.open(address)
    window.choose_file("#image", tmp_path / "<script>window.hurt=1<.png")
    window.forget()
    window.run("document.querySelector('button').click()")
    window.wait("Page.loadEventFired")
    assert window.run("location.pathname") == "/search"
    assert window.run("document.querySelector('.sent img').naturalWidth") == 40
    assert window.run("document.querySelectorAll('.results li').length") == 24
    assert json.loads(window.run(SCRIPTS))[:3] == [0, 0, "undefined"]


def test_what_cannot_be_answered_is_told_and_leaves_the_form(
    window: Browser,
    address: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "no.png").write_text("no image")
    window.open(address)
    window.choose_file("#image", tmp_path / "no.png")
    window.forget()
    window.run("document.querySelector('button').click()")
    window.wait("Page.loadEventFired")
    assert "cannot be read" in window.run("document.querySelector('[role=alert]').textContent")
    assert window.run("document.querySelectorAll('form input').length") >= 4


def test_everything_that_can_be_used_has_a_name_for_a_screen_reader(
    window: Browser,
    address: str,
) -> None:
    window.open(f"{address}?q=shape&like=2&k=5")
    told: list[tuple[str, Any]] = window.names()
    used = ("button", "checkbox", "combobox", "link", "searchbox", "spinbutton", "textbox")
    assert not [role for role, name in told if role in used and not name.strip()]
    roles = {role for role, _ in told}
    assert {"main", "search", "status", "searchbox", "spinbutton"} <= roles
    assert (
        len({name for role, name in told if role == "link" and name.startswith("like this")}) == 5
    )


def test_the_policy_is_what_stops_a_script_if_one_ever_came(window: Browser, address: str) -> None:
    window.open(address)
    window.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: "
        "'window.hurt=1'}))"
    )
    assert window.run("typeof window.hurt") == "undefined"


def test_the_page_follows_light_and_dark(window: Browser, address: str) -> None:
    grounds = []
    for dark in (False, True):
        window.resize(1280, dark=dark)
        window.open(address)
        grounds.append(window.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(253, 253, 251)", "rgb(22, 24, 27)"]
