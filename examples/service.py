"""A search service with FastAPI, on an index that another process updates.

    pip install fastapi uvicorn 'apecache[cpu]'
    INDEX=index uvicorn examples.service:app

`apecache index run --store store --out index --update` replaces the index as a whole. The next
request then opens the new one.
"""

import os
from pathlib import Path
from threading import Lock

from fastapi import FastAPI

import apecache

app = FastAPI(title="apecache")
folder = Path(os.environ.get("INDEX", "index"))
lock = Lock()
opened: dict[float, apecache.SearchIndex] = {}


def current() -> apecache.SearchIndex:
    """Return the index in its newest form; its encoders are loaded again only after a change."""
    changed = (folder / "index.json").stat().st_mtime
    if changed not in opened:
        opened.clear()
        opened[changed] = apecache.SearchIndex.open(folder)
    return opened[changed]


@app.get("/search")
def search(text: str, k: int = 5, where: str | None = None) -> list[dict[str, object]]:
    """Find images by words."""
    with lock:
        hits = current().find(apecache.Query(like=[text]), k=k, where=where)
    return [vars(hit) for hit in hits]
