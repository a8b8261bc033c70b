"""Structure of jarm, read from its source: a picture of the rooms, their imports, and the size of its parts.

    python docs/architecture.py draw [OUT.svg]
    python docs/architecture.py walk
    python docs/architecture.py count [--beside NAME=FOLDER ...]

The same source gives the same bytes; nothing of it is imported. The floors are those of `tests/test_architecture.py`.
"""

import argparse
import ast
import collections
import html
import itertools
import pathlib
import re
import statistics
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jarm"
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
LONG = 60  # lines of body of a function that is named
# The word, or axes in brackets: [N, F], [..., d], [n].
SHAPE = re.compile(
    r"\b[Ss]hape[sd]?\b|\[(\.\.\.|[A-Za-z]\w?|[a-z]\w+|\d+(?=, ?[A-Za-z]))(, ?[\w.*+-]+)+,?\]|\[[A-Za-z],?\]"
)

# The imports


def modules(folder):
    """Path of every module below a folder by its dotted name, tests left out."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if not any(re.fullmatch(r"_?tests?|test_.*|.*_test", part) for part in parts):
            found[".".join((folder.name, *parts)).removesuffix(".__init__")] = path
    return found


def imports(name, path):
    """Dotted names that a module imports: a list for each import line, those inside functions included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            yield [".".join(filter(None, [*above, node.module, alias.name])) for alias in node.names]


def assigned(path, name):
    """Expression that a module assigns to a name, without running it; nothing if it assigns none."""
    for node in ast.parse(path.read_text()).body:
        if name in [getattr(target, "id", "") for target in getattr(node, "targets", [getattr(node, "target", None)])]:
            return node.value


def room_of(name):
    """Room of a dotted name: the part after the package, empty for the package itself."""
    return f"{name}.".split(".")[1]


def arrows(folder):
    """Number of import lines by (importing room, imported room). The top `__init__.py` belongs to no room."""
    found, lines = modules(folder), collections.Counter()
    rooms = {room_of(name) for name in found} - {""}
    for name, path in found.items():
        for targets in imports(name, path):
            reached = {room_of(target) for target in targets if target.startswith(f"{folder.name}.")}
            lines.update((room_of(name), room) for room in sorted(reached & rooms - {room_of(name)}) if room_of(name))
    return lines


def walk():
    """Text with a line for each room: the rooms it imports, with the number of import lines."""
    lines = arrows(PACKAGE)
    for room in (room for floor in reversed(floors()) for room in floor):
        reached = sorted((target, count) for (source, target), count in lines.items() if source == room)
        yield f"{room} -> {', '.join(f'{target} {count}' for target, count in reached) or 'nothing'}"


# The size of the parts


def defined(folder):
    """Every function below a folder, as (qualified name, node, whether it is public)."""

    def inside(parent, name, public):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (*FUNCTION, ast.ClassDef)):
                open_to_all = public and not node.name.startswith("_")
                if isinstance(node, FUNCTION):
                    yield f"{name}.{node.name}", node, open_to_all
                yield from inside(node, f"{name}.{node.name}", open_to_all and isinstance(node, ast.ClassDef))
            else:
                yield from inside(node, name, public)

    for name, path in modules(folder).items():
        if path.name != "__init__.py":
            yield from inside(ast.parse(path.read_text()), name.partition(".")[2], True)


def lines_of(node):
    """Number of lines from the first to the last of a node, decorators left out."""
    return node.end_lineno - node.lineno + 1


def lines_of_body(function):
    """Number of lines of a function without its docstring."""
    return lines_of(function) - (lines_of(function.body[0]) if ast.get_docstring(function) is not None else 0)


def spread(lengths):
    """Text with the median, the ninth decile and the maximum."""
    ordered = sorted(lengths)
    return f"{statistics.median(ordered):g} / {ordered[len(ordered) * 9 // 10]} / {ordered[-1]}"


def has_shapes(function):
    """Whether the signature of a function says the shape of an array, as in `Float[Array, "N F"]`."""
    nodes = itertools.chain(*(ast.walk(side) for side in (function.args, function.returns) if side is not None))
    parts = [node.slice.elts for node in nodes if isinstance(getattr(node, "slice", None), ast.Tuple)]
    return any(isinstance(part[-1], ast.Constant) and not isinstance(part[0], ast.Constant) for part in parts if part)


def long_ones(folder):
    """Text of every function with more than LONG lines of body, the longest first."""
    found = []
    for name, node, _ in defined(folder):
        if (length := lines_of_body(node)) > LONG:
            closures = sum(isinstance(part, FUNCTION) for part in ast.walk(node)) - 1
            found.append((-length, f"`{name}` {length}" + (f" (closures: {closures})" if closures else "")))
    return [says for _, says in sorted(found)]


def counts(folder):
    """Text of each row of the table for one package."""
    sizes = [len(path.read_text().splitlines()) for path in modules(folder).values() if path.name != "__init__.py"]
    functions = [node for _, node, _ in defined(folder)]
    public = [node for _, node, is_public in defined(folder) if is_public]
    documents = [document for node in public if (document := ast.get_docstring(node)) is not None]
    lines, top = arrows(folder), assigned(folder / "__init__.py", "__all__")
    return {
        "modules; median / max lines": f"{len(sizes)}; {statistics.median(sizes):g} / {max(sizes)}",
        "functions; median / p90 / max lines": f"{len(functions)}; {spread(map(lines_of, functions))}",
        "the same without docstring": spread(map(lines_of_body, functions)),
        f"functions of more than {LONG} lines without docstring": len(long_ones(folder)),
        "public functions with a docstring": f"{len(documents)} of {len(public)}",
        "... with a runnable example": sum(">>>" in document for document in documents),
        "... with a shape in the docstring": sum(bool(SHAPE.search(document)) for document in documents),
        "... with a shape in the signature": sum(map(has_shapes, public)),
        "names in `__all__`": len(top.elts) if top else "-",
        "arrows between rooms; import lines; arrows with one back": (
            f"{len(lines)}; {lines.total()}; {sum(pair[::-1] in lines for pair in lines)}"
        ),
    }


def count(packages):
    """Lines of a Markdown table with a column for each package, then the long functions by name."""
    table = {name: counts(folder) for name, folder in packages.items()}
    yield f"| | {' | '.join(table)} |"
    yield "|---" * (1 + len(table)) + "|"
    for row in next(iter(table.values())):
        yield f"| {row} | {' | '.join(str(column[row]) for column in table.values())} |"
    for name, folder in packages.items():
        named = long_ones(folder)
        shown = named if folder == PACKAGE else named[:3]
        more = f" and {len(named) - len(shown)} more" if shown != named else ""
        yield f"\n{name}, lines without docstring: {', '.join(shown) or 'none'}{more}."


# The picture

BOX, LANE, GAP = 162, 10, 18  # px: width of a room, width of a line that passes a floor, space between two
BAR, TALL, STOREY, MARGIN = 46, 120, 176, 24  # px: height of a full-width room, of a room, of a floor; edge
STARTS = 9  # orders that the search begins with
FAINT = ' fill="#667"'
HUES = ["#2f6db5", "#c4622d", "#2e8b57", "#8e4fa8", "#a87f14", "#c0396b", "#2b8793", "#5f6b7a", "#7a5230"]


def floors():
    """Rooms of each floor, the bottom one first; a room without modules is left out."""
    held = ast.literal_eval(assigned(ROOT / "tests" / "test_architecture.py", "FLOORS"))
    rooms = {room_of(name) for name in modules(PACKAGE)}
    return [present for floor in held if (present := [room for room in floor if room in rooms])]


def steps(rows, lines):
    """Import lines by (upper stop, lower stop), every step one floor down; the lanes join their rows.

    An arrow past a floor runs in a lane there, (room it leads to, floor), shared by all arrows to that room.
    """
    floor_of, found = {room: floor for floor, row in enumerate(rows) for room in row}, collections.Counter()
    for (source, target), count in sorted(lines.items()):
        if floor_of[source] <= floor_of[target]:
            raise SystemExit(f"{source} imports {target}, which is not on a lower floor")
        passed = [(target, floor) for floor in range(floor_of[source] - 1, floor_of[target], -1)]
        for lane in passed:
            rows[lane[1]] += [lane] * (lane not in rows[lane[1]])
        found.update({pair: count for pair in itertools.pairwise([source, *passed, target])})
    return found


def half(stop):
    """Half the width of a room or a lane, with its share of the space between two."""
    return ((LANE if isinstance(stop, tuple) else BOX) + GAP) / 2


def settled(row, wishes):
    """Places nearest to the wishes that keep the order of a row and its spaces (isotonic regression)."""
    offsets = [0, *itertools.accumulate(half(a) + half(b) for a, b in itertools.pairwise(row))]
    blocks = []  # sum of wishes less offsets, number of stops
    for offset, stop in zip(offsets, row, strict=True):
        blocks.append((wishes[stop] - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            (a, m), (b, n) = blocks.pop(), blocks.pop()
            blocks.append((a + b, m + n))
    shifts = [total / number for total, number in blocks for _ in range(number)]
    return {stop: shift + offset for stop, shift, offset in zip(row, shifts, offsets, strict=True)}


def placed(rows, near):
    """Middle of every stop: each row in turn settles over the stops that it is joined to."""
    middle = {stop: 0.0 for row in rows for stop in row}
    for row in [*rows, *rows[::-1]] * 3:
        middle |= settled(row, {s: sum(middle[t] for t in near[s]) / len(near[s]) if near[s] else 0.0 for s in row})
    return middle


def cost(rows, found, near):
    """Length of all lines sideways, and a price for the width and for each crossing."""
    middle = placed(rows, near)
    total = 2 * (max(middle.values()) - min(middle.values()))
    for row in map(set, rows):
        ends = [(middle[upper], middle[lower]) for upper, lower in found if upper in row]
        total += sum(abs(a - b) for a, b in ends)
        total += 150 * sum((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(ends, 2))
    return total


def improved(rows, found, near):
    """Cost and order of the rows once no stop can move within its row and lower the cost."""
    rows, best, before = [list(row) for row in rows], cost(rows, found, near), None
    while best != before:
        before = best
        for floor, row in enumerate(rows):
            for stop, place in itertools.product(row, range(len(row))):
                rest = [other for other in rows[floor] if other != stop]
                trial = [*rows[:floor], [*rest[:place], stop, *rest[place:]], *rows[floor + 1 :]]
                if (new := cost(trial, found, near)) < best - 1e-6:
                    best, rows = new, trial
    return best, rows


def arranged(rows, found):
    """Middle of every stop, in the best order found from some orders of the lowest row."""
    near = collections.defaultdict(list)
    for upper, lower in found:
        near[upper].append(lower)
        near[lower].append(upper)
    starts = list(itertools.permutations(rows[0]))
    tried = [improved([start, *rows[1:]], found, near) for start in starts[:: max(1, len(starts) // STARTS)]]
    return placed(min(tried, key=lambda pair: pair[0])[1], near)


def ports(stop, others, middle):
    """Places at an edge of a stop for its lines to others, in their order from left to right."""
    reach = 0 if isinstance(stop, tuple) else 0.7 * BOX * (1 - 1 / len(others))
    places = [middle[stop] + reach * (place / max(len(others) - 1, 1) - 0.5) for place in range(len(others))]
    return dict(zip(sorted(others, key=middle.get), places, strict=True))


def line(pair, found, middle, top, hues):
    """SVG of a step: down through the lane that it comes from, if any, over to the next stop, a head at a room."""
    upper, lower = pair
    target = lower if isinstance(lower, str) else lower[0]
    x = ports(upper, [b for a, b in found if a == upper], middle)[lower]
    a, b = ports(lower, [a for a, b in found if b == lower], middle)[upper], top[lower]
    y, width, hue = top[upper] + TALL, 1 + 0.9 * found[pair] ** 0.5, hues[target]
    start, end = y - TALL * isinstance(upper, tuple), b - 7 * isinstance(lower, str)
    way = f"M{x:.1f} {start}V{y}C{x:.1f} {y + 30} {a:.1f} {b - 36} {a:.1f} {end}"
    head = f'<path d="M{a:.1f} {b}l{-4 - width / 2:.1f} -10h{8 + width:.1f}z" fill="{hue}"/>'
    says = f"{upper if isinstance(upper, str) else 'rooms above'} to {target}: {found[pair]} import lines"
    drawn = f'<path d="{way}" fill="none" stroke="{hue}" stroke-width="{width:.1f}"/>{head * isinstance(lower, str)}'
    return f"<g><title>{says}</title>{drawn}</g>"


def text(x, y, words, size=12, extra=""):
    """SVG of a line of text around x."""
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}"{extra}>{html.escape(words)}</text>'


def box(room, x, y, width, height, hue):
    """SVG of a room: its name, the first sentence of its docstring, its modules and hundreds of lines."""
    paths = [path for name, path in modules(PACKAGE).items() if room_of(name) == room]
    lines = round(sum(len(path.read_text().splitlines()) for path in paths), -2)
    size = f"{len(paths) - 1} modules, {lines:,} lines" if len(paths) > 1 else f"{lines:,} lines"
    says = " ".join(ast.get_docstring(ast.parse(paths[0].read_text())).split("\n\n")[0].replace("`", "").split())
    rows, foot = (textwrap.wrap(says, int(width / 6.8)), size) if height == TALL else ([f"{says} {size}"], "")
    shape = f'x="{x - width / 2:.1f}" y="{y}" width="{width}" height="{height}" rx="6" stroke-width="1.5"'
    texts = (text(x, y + 36 + 14 * row, words) for row, words in enumerate(rows))
    name, end = text(x, y + 19, room, 15, ' font-weight="bold"'), text(x, y + height - 8, foot, 11, FAINT)
    return [f'<rect {shape} fill="#fff" stroke="{hue}"/>', name, *texts, end]


def band(y, width, floor):
    """SVG of a floor behind its rooms, with its number."""
    shape = f'x="8" y="{y - 8}" width="{width - 16}" height="{TALL + 16}" rx="10" fill="#eef1f6"'
    return f"<rect {shape}/>{text(38, y + 8, f'floor {floor}', 11, FAINT)}"


def draw():
    """SVG of the rooms: floors from top to bottom, an arrow from a room to each room that it imports."""
    (ground,), *rows, (roof,) = floors()
    lines = {pair: count for pair, count in arrows(PACKAGE).items() if ground not in pair and roof not in pair}
    targets = [room for row in rows for room in row if room in {target for _, target in lines}]
    hues, rooms = dict(zip(targets, itertools.cycle(HUES))), [room for row in rows for room in row]
    found = steps(rows, lines)
    middle = arranged(rows, found)
    left = min(x - half(stop) for stop, x in middle.items()) - MARGIN - 34
    middle = {stop: x - left for stop, x in middle.items()}
    width = round(max(x + half(stop) for stop, x in middle.items()) + MARGIN)
    top = {stop: 120 + STOREY * (len(rows) - 1 - floor) for floor, row in enumerate(rows) for stop in row}
    low = 120 + STOREY * len(rows)
    says = "An arrow leads to a room that is imported; thicker means more import lines."
    left_out = f"Left out: the arrows from {roof}, and those from every room to {ground}."
    parts = [
        text(width / 2, 24, f"{says} {left_out}", 13),
        *(band(top[row[0]], width, floor) for floor, row in enumerate(rows, 2)),
        *(line(pair, found, middle, top, hues) for pair in sorted(found, key=found.get, reverse=True)),
        *(part for room in rooms for part in box(room, middle[room], top[room], BOX, TALL, hues.get(room, "#334"))),
        *(part for room, y in ((roof, 44), (ground, low)) for part in box(room, width / 2, y, width - 16, BAR, "#334")),
    ]
    size, font = f'viewBox="0 0 {width} {low + BAR + 12}"', 'font-family="Helvetica, Arial, sans-serif" fill="#223"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} text-anchor="middle">'
    return "\n".join([start, f'<rect width="{width}" height="{low + BAR + 12}" fill="#fff"/>', *parts, "</svg>\n"])


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="picture of the rooms as SVG")
    drawing.add_argument("out", nargs="?", type=pathlib.Path, default=ROOT / "docs" / "figures" / "rooms.svg")
    commands.add_parser("walk", help="rooms and the rooms they import, with the number of import lines")
    counting = commands.add_parser("count", help="Markdown table of sizes")
    counting.add_argument("--beside", nargs="*", default=[], metavar="NAME=FOLDER", help="packages to put beside jarm")
    given = parser.parse_args()
    if given.command == "draw":
        given.out.write_text(draw())
    elif given.command == "walk":
        print("\n".join(walk()))
    else:
        beside = dict(pair.split("=", 1) for pair in given.beside)
        print("\n".join(count({"jarm": PACKAGE} | {name: pathlib.Path(folder) for name, folder in beside.items()})))


if __name__ == "__main__":
    main()
