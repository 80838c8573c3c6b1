"""How the scripts of this folder show a table and what became of a claim; nothing but Python is needed."""

MISSED: list[str] = []  # claims that did not hold


def claim(said: str, held: bool) -> None:
    "Print what was claimed and measured; the script that asks ends with status 1 where one did not hold"
    print(said if held else f"{said} NOT HELD")
    MISSED.extend([] if held else [said])


def show(table, digits: int = 4) -> None:
    "A table as Markdown"
    print("| " + " | ".join([table.index.name or "", *map(str, table.columns)]) + " |")
    print("| --- |" + " --- |" * len(table.columns))
    for name, row in zip(table.index, table.to_numpy()):
        print(f"| {name} | " + " | ".join("–" if x != x else f"{x:.{digits}g}" for x in row) + " |")
    print()
