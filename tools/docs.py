"""Build the site into _docs: `make docs`. With `quarto` on the PATH, Quarto does it; without, mkdocs, and offline."""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from pages import BLOB, NBS, ROOT, SETTINGS, Page, write_pages

STYLE = Path(__file__).parent / "site"


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def listed(contents: list) -> list[str]:
    "The notebooks of a sidebar, in its order"
    found = []
    for item in contents:
        if isinstance(item, str):
            found.append(item)
        else:
            found += [item["href"]] if "href" in item else listed(item["contents"])
    return found


def navigation(contents: list, pages: dict[str, Page]) -> list:
    "The sidebar in the words of mkdocs"
    nav = []
    for item in contents:
        if isinstance(item, str):
            nav.append({pages[item].title: pages[item].target})
        elif "href" in item:
            nav.append({item["text"]: pages[item["href"]].target})
        else:
            nav.append({item["section"]: navigation(item["contents"], pages)})
    return nav


def palette() -> list[dict]:
    "Light and dark: as the system has it, or as the reader chose"
    kinds = [("", "auto", "light"), (": light", "light", "dark"), (": dark", "dark", "system preference")]
    colours = dict(primary="custom", accent="custom")  # see site.css
    icons = ["material/brightness-auto", "material/brightness-7", "material/brightness-4"]
    return [
        dict(
            media=f"(prefers-color-scheme{media})",
            toggle=dict(icon=icon, name=f"switch to {following}"),
            **({} if not media else dict(scheme="slate" if "dark" in media else "default", **colours)),
        )
        for (media, _, following), icon in zip(kinds, icons)
    ]


def configuration(source: Path, target: Path, pages: list[Page], sidebar: list) -> dict:
    "What mkdocs needs to know; title and description come from _quarto.yml"
    website = read(ROOT / "_quarto.yml")["website"]
    by_notebook = {p.notebook: p for p in pages}
    links = dict(not_found="warn", anchors="warn", absolute_links="warn", unrecognized_links="warn")
    return dict(
        site_name=website["title"],
        site_description=website["description"],
        docs_dir=str(source),
        site_dir=str(target),
        use_directory_urls=False,
        strict=True,
        copyright=f"{SETTINGS['copyright']}, Apache 2.0",
        nav=navigation(sidebar, by_notebook),
        validation=dict(nav=dict(omitted_files="warn", not_found="warn"), links=links),
        theme=dict(
            name="material",
            font=False,
            palette=palette(),
            icon=dict(logo="material/magnify-scan", view="material/file-code-outline"),
            features=[
                "navigation.top",
                "navigation.footer",
                "navigation.indexes",
                "navigation.path",
                "toc.follow",
                "search.suggest",
                "search.highlight",
                "content.code.copy",
                "content.action.view",
            ],
        ),
        plugins=["search", "offline"],
        hooks=[str(Path(__file__).with_name("pages.py"))],
        extra_css=["site.css"],
        extra=dict(
            generator=False,
            polyfills=["iframe-worker.js"],
            notebooks={p.target: f"{BLOB}/nbs/{p.notebook}" for p in pages},
            social=[dict(icon="fontawesome/brands/github", link=website["repo-url"], name="the repository")],
        ),
        markdown_extensions=[
            "attr_list",
            "md_in_html",
            "tables",
            "pymdownx.details",
            "pymdownx.superfences",
            {"pymdownx.highlight": dict(anchor_linenums=False, pygments_lang_class=True)},
            {"pymdownx.arithmatex": dict(generic=True)},
            {"toc": dict(permalink="¶", toc_depth=3)},
        ],
    )


def build(target: Path, work: Path) -> None:
    "Notebooks → Markdown → pages in `target`"
    from mkdocs.commands.build import build as make
    from mkdocs.config import load_config

    sidebar = read(NBS / "sidebar.yml")["website"]["sidebar"]["contents"]
    shutil.rmtree(work, ignore_errors=True)
    source = work / "pages"
    pages = write_pages(listed(sidebar), source)
    for own in STYLE.iterdir():
        shutil.copy(own, source)
    path = work / "mkdocs.yml"
    path.write_text(yaml.safe_dump(configuration(source, target, pages, sidebar), sort_keys=False), encoding="utf-8")
    make(load_config(str(path)))
    for name in ("404.html", "sitemap.xml", "sitemap.xml.gz"):  # for servers; their links lead nowhere from disk
        (target / name).unlink(missing_ok=True)


def quarto(target: Path) -> None:
    "The notebooks as nbdev prepares them, rendered by Quarto (`nbdev_docs` would also rewrite README.md)"
    from nbdev.serve import proc_nbs

    made = Path(proc_nbs())
    subprocess.run(["quarto", "render", "--no-cache"], cwd=made, check=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(made / read(ROOT / "_quarto.yml")["project"]["output-dir"], target)


def main() -> None:
    own = argparse.ArgumentParser(description=__doc__)
    own.add_argument("--output", type=Path, default=ROOT / read(ROOT / "_quarto.yml")["project"]["output-dir"])
    own.add_argument("--work", type=Path, default=ROOT / "build" / "docs", help="folder for the Markdown pages")
    own.add_argument("--no-quarto", action="store_true", help="use mkdocs even where Quarto is")
    args = own.parse_args()
    start = time.monotonic()
    if shutil.which("quarto") and not args.no_quarto:
        quarto(args.output.resolve())
    else:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
        os.environ["NO_MKDOCS_2_WARNING"] = "true"  # the theme's advertisement of its successor
        build(args.output.resolve(), args.work.resolve())
    print(f"built in {time.monotonic() - start:.0f} s; open {args.output / 'index.html'}")


if __name__ == "__main__":
    main()
