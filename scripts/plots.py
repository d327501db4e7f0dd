#!/usr/bin/env python3
"""Draws docs/benchmarks/*.svg from a run of `make bench` (benches/runs/*-bench.txt).

Usage: plots.py RUN FOLDER. Reads the tables of the run, nothing else: what is drawn was measured in one
run, side by side.
"""

import pathlib
import re
import sys

import pygal
from pygal.style import Style

COLOURS = {
    "direct": "#8d99ae",
    "HAProxy": "#457b9d",
    "PgBouncer": "#e9a03b",
    "pgsilo": "#2a9d8f",
    "pgsilo prewarm": "#1b6f65",
    "pgsilo reuse": "#0f443e",
}


def sections(text):
    """The run's parts: heading -> the lines below it, up to an empty one."""
    found = {}
    for block in text.split("\n\n"):
        heading, *lines = block.strip("\n").split("\n")
        found[heading] = lines
    return found


def rows(lines, column):
    """name -> the figure in a column, of the lines that are a contender's."""
    found = {}
    for line in lines:
        name = next((n for n in sorted(COLOURS, key=len, reverse=True) if line.startswith(n + " ")), None)
        figures = re.findall(r"-?\d+(?:\.\d+)?", line[len(name):]) if name else []
        if len(figures) > column:
            found[name] = float(figures[column])
    return found


def points(lines):
    """name -> [(the first figure, the last one)], of all lines that are a contender's."""
    found = {}
    for line in lines:
        name = next((n for n in COLOURS if line.startswith(n + " ")), None)
        figures = re.findall(r"\d+(?:\.\d+)?", line[len(name):]) if name else []
        if figures:
            found.setdefault(name, []).append((float(figures[0]), float(figures[-1])))
    return found


def drawing(kind, title, unit, names, **more):
    """An empty chart of a kind."""
    style = Style(
        background="white",
        plot_background="white",
        font_family="sans-serif",
        colors=[COLOURS[name] for name in names],
        title_font_size=18,
        label_font_size=13,
        major_label_font_size=13,
        legend_font_size=13,
        value_font_size=12,
    )
    return kind(
        style=style,
        width=720,
        height=380,
        legend_at_bottom=True,
        truncate_legend=-1,
        legend_at_bottom_columns=len(names),
        js=[],
        value_formatter=lambda value: f"{value:.2f}" if value < 10 else f"{value:.0f}",
        title=f"{title} ({unit})",
        disable_xml_declaration=True,
        **more,
    )


def chart(title, unit, groups, names):
    """Bars: groups is [(label, {name: figure})]."""
    bars = drawing(pygal.Bar, title, unit, names, print_values=True)
    bars.x_labels = [label for label, _ in groups]
    for name in names:
        bars.add(name, [figures.get(name) for _, figures in groups])
    return bars.render(is_unicode=True)


def course(title, unit, x_title, lines):
    """Lines: name -> [(x, y)]."""
    names = list(lines)
    xy = drawing(pygal.XY, title, unit, names, x_title=x_title, range=(0, None), include_x_axis=True)
    for name in names:
        xy.add(name, lines[name])
    return xy.render(is_unicode=True)


def main():
    run, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    parts = sections(run.read_text(encoding="utf-8"))

    def part(words):
        found = [lines for heading, lines in parts.items() if words in heading]
        if len(found) != 1:
            sys.exit(f"{run}: {len(found)} parts are about {words!r}, not one")
        return found[0]

    peers = ["HAProxy", "PgBouncer", "pgsilo"]
    folder.mkdir(parents=True, exist_ok=True)
    queries = [
        (label, rows(part(words), 1))
        for label, words in [
            ("1 client", "1 clients, in clear"),
            ("8 clients", "8 clients, in clear"),
            ("32 clients", "32 clients, in clear"),
            ("8 clients, TLS", "8 clients, TLS"),
        ]
    ]
    copies = [("COPY out", rows(part("COPY out"), 1)), ("COPY in", rows(part("COPY in"), 1))]
    logins = [(label, rows(part(f"A login by libpq, 20 a second at each, {how}"), 0))
              for label, how in [("in clear", "clear"), ("TLS", "tls")]]
    churn = [(label, rows(part(f"pgbench -S -C, 4 clients, {how}"), 0))
             for label, how in [("in clear", "clear"), ("TLS", "tls")]]
    memory = part("KiB of memory")
    idle = [(label, rows([line.replace(how, "", 1) for line in memory if f" {how} " in line], 0))
            for label, how in [("in clear", "clear"), ("TLS", "tls")]]
    everyone = list(COLOURS)
    for name, svg in {
        "queries": chart("Small queries", "of a direct connection", queries, peers),
        "copies": chart("Bulk", "of a direct connection", copies, peers),
        "logins": chart("A login, median", "ms", logins, everyone),
        "churn": chart("Logins of four clients that connect for each query", "a second", churn, everyone),
        "idle": chart("An idle session", "KiB", idle, peers),
        "scale": course("99 of 100 queries among idle sessions take at most", "us", "idle sessions",
                        points(part("idle sessions with a stand-in"))),
    }.items():
        # Some random names that would make each drawing differ from the last.
        svg = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", name, svg)
        (folder / f"{name}.svg").write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
