"""The rows that were measured, by case, work and library."""

from collections import defaultdict

OURS = "jaxnorm"


class Comparison:
    """Times (in milliseconds), floors, notes and facts. `cases` are in order."""

    def __init__(self, rows: list[dict]):
        self.cases: dict[str, dict] = {}
        self.times: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        self.floors: dict[tuple[str, str], float] = {}
        self.notes: dict[str, dict[str, str]] = defaultdict(dict)
        self.facts: dict[str, dict[str, dict]] = defaultdict(dict)
        self.libraries = [OURS]
        for row in rows:
            self._add(row)

    def _add(self, row: dict) -> None:
        case, library = row["case"], row["library"]
        self.cases.setdefault(case, row | {"works": []})
        if library not in self.libraries:
            self.libraries.append(library)
        if "note" in row:
            self.notes[case][library] = row["note"]
        if "milliseconds" not in row:
            return
        key = case, row["work"]
        self.times[key][library] = row["milliseconds"][0]
        self.facts[case][library] = row
        if "floor_milliseconds" in row:
            self.floors[key] = row["floor_milliseconds"]
        if row["work"] not in self.cases[case]["works"]:
            self.cases[case]["works"].append(row["work"])

    @property
    def peers(self) -> list[str]:
        return self.libraries[1:]

    def ratio(self, case: str, work: str, library: str) -> float | None:
        """Of its time to jaxnorm's; None where it has none."""
        times = self.times[case, work]
        return times[library] / times[OURS] if library in times else None

    def over_floor(self, case: str, work: str, library: str = OURS) -> float | None:
        key = case, work
        has = key in self.floors and library in self.times[key]
        return self.times[key][library] / self.floors[key] if has else None


def describe(case: dict) -> str:
    """The array of a case, in short."""
    batch, *space, channels = case["shape"]
    first = case["layout"] == "first"
    shape = (batch, channels, *space) if first else case["shape"]
    text = f"{'x'.join(map(str, shape))} {case['dtype']}"
    text += ", channels first" if first else ""
    return text + (f", {case['devices']} devices" if "sync" in case["op"] else "")
