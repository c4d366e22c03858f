"""What `bench_bus.py` measured, told: tables, goals, JSON, Markdown and a picture.

Here: medians, ratios, what was wanted, and how it is shown. Not here: servers and measurements.
"""
import json
import math
import os
import statistics
from xml.sax.saxutils import escape

SYSTEMS = ("castra", "mosquitto", "jetstream", "redis", "raw")
NAMES = {"castra": "castra", "mosquitto": "Mosquitto", "jetstream": "JetStream", "redis": "Redis", "raw": "raw relay",
         "castra-batch": "castra, batch", "disk": "bare disk"}
# What has happened when a publisher sees its ack. Beside every ratio, because it is half of what a ratio says.
ACKS = {
    "castra": "its line is in bus.log (written to the kernel; fdatasync every second)",
    "castra-batch": "its line is on disk (sync = \"batch\": fdatasync before the ack, many publishes in one)",
    "mosquitto": "it is in the server's memory (QoS 1; the persistence file is written at intervals and at the end)",
    "jetstream": "it is in the stream's file (written to the kernel; fsync every two minutes)",
    "redis": "it is in the append-only file (written to the kernel; fdatasync every second)",
    "raw": "the relay has read it; nothing is kept",
    "disk": "(no server) its group of 64 lines is on disk",
}
SHORT_ACKS = {"mosquitto": "in memory", "jetstream": "in its file", "redis": "in its file", "raw": "nothing kept",
              "disk": "on disk", "castra": "in its file", "castra-batch": "on disk"}

# Figure, part of it, how the part is headed, digits after the point.
COLUMNS = (
    ("publish", "per_second", "publish to ack, per second", 0),
    ("fan-out", "per_second", "deliveries per second", 0),
    ("latency", "p50_us", "publish to subscriber p50, us", 0),
    ("latency", "p99_us", "publish to subscriber p99, us", 0),
    ("latency", "p999_us", "publish to subscriber p99.9, us", 0),
    ("others", "p50_us", "beside a stalled consumer p50, us", 0),
    ("others", "p99_us", "beside a stalled consumer p99, us", 0),
    ("others", "worst_us", "beside a stalled consumer worst, us", 0),
    ("others", "stalled_cut_off", "stalled consumer cut off (1: yes)", 0),
    ("handshake", "p50_us", "handshake p50, us", 0),
    ("handshake", "p99_us", "handshake p99, us", 0),
    ("idle", "kib_each", "resident KiB per session", 1),
)

# Figure, part, what castra's is divided by (a system of the same figure, another figure of castra,
# or nothing), whether more is better, and the wanted bound.
AT_LEAST, AT_MOST = True, False
GOALS = (
    ("publish 1x1", "per_second", "mosquitto", AT_LEAST, 0.75),
    ("publish 1x1", "per_second", "jetstream", AT_LEAST, 1),
    ("publish 1x64", "per_second", "mosquitto", AT_LEAST, 10),
    ("publish 1x64", "per_second", "jetstream", AT_LEAST, 5),
    ("publish 1x64", "per_second", "redis", AT_LEAST, 1.5),
    ("publish 1x64", "per_second", "raw", AT_LEAST, 0.25),
    ("publish 1x1024", "per_second", "mosquitto", AT_LEAST, 12),
    ("publish 1x1024", "per_second", "jetstream", AT_LEAST, 5),
    ("publish 1x1024", "per_second", "redis", AT_LEAST, 2.5),
    ("publish 8x64", "per_second", "mosquitto", AT_LEAST, 8),
    ("publish 8x64", "per_second", "jetstream", AT_LEAST, 2.5),
    ("publish 8x64", "per_second", "redis", AT_LEAST, 1.2),
    ("publish 1x64 on disk", "per_second", "disk", AT_LEAST, 0.6),
    ("fan-out 8", "per_second", "mosquitto", AT_LEAST, 40),
    ("fan-out 8", "per_second", "jetstream", AT_LEAST, 5),
    ("fan-out 8", "per_second", "redis", AT_LEAST, 1),
    ("fan-out 64", "per_second", "mosquitto", AT_LEAST, 80),
    ("fan-out 64", "per_second", "jetstream", AT_LEAST, 8),
    ("fan-out 64", "per_second", "redis", AT_LEAST, 2),
    ("latency 200", "p50_us", "raw", AT_MOST, 2),
    ("latency 200", "p99_us", "raw", AT_MOST, 3),
    ("latency 10000", "p50_us", "raw", AT_MOST, 1.5),
    ("latency 10000", "p99_us", "raw", AT_MOST, 3),
    ("handshake", "p50_us", "mosquitto", AT_MOST, 1.5),
    ("handshake", "p99_us", "mosquitto", AT_MOST, 3),
    ("others beside a stalled one", "p99_us", "others", AT_MOST, 1.5),
    ("others beside a stalled one", "worst_us", None, AT_MOST, 15_000),
    ("idle", "kib_each", None, AT_MOST, 20),
    ("instructions", "per_publish", None, AT_MOST, 8000),
)
PARTS = {"per_second": "", "p50_us": ", p50", "p99_us": ", p99", "worst_us": ", worst, us", "kib_each": ", KiB each",
         "per_publish": " per publish"}
TITLES = {"publish 1x1": "publish to ack 1 x 1", "publish 1x64": "publish to ack 1 x 64",
          "publish 1x1024": "publish to ack 1 x 1024", "publish 8x64": "publish to ack 8 x 64",
          "publish 1x64 on disk": "on disk 1 x 64", "fan-out 8": "fan-out 1 to 8", "fan-out 64": "fan-out 1 to 64",
          "latency 200": "to subscriber, 200/s", "latency 10000": "to subscriber, 10,000/s",
          "handshake": "handshake", "others beside a stalled one": "others of a stalled one",
          "idle": "idle session", "instructions": "user instructions"}
BEGIN, END = "<!-- bench-bus -->\n", "<!-- /bench-bus -->\n"


class Goal:
    """One bound and what was reached; more is better, or less."""

    def __init__(self, figure, part, against, at_least, bound, reached):
        self.figure, self.part, self.against, self.at_least, self.bound, self.reached = (
            figure, part, against, at_least, bound, reached)
        self.met = reached >= bound if at_least else reached <= bound
        # Above one: met, by so much.
        self.margin = (reached / bound if at_least else bound / reached) if reached > 0 else math.inf

    def title(self):
        return TITLES[self.figure] + PARTS[self.part]

    def wanted(self):
        return f"{'>=' if self.at_least else '<='} {self.bound:g}{self.unit()}"

    def unit(self):
        return "" if self.against is None else "x"

    def over(self):
        if self.against is None:
            return ""
        return "without it" if self.against == "others" else NAMES[self.against]

    def ack(self):
        """What the other's ack means; of no interest where nothing was acknowledged."""
        return SHORT_ACKS.get(self.against, "") if self.part == "per_second" else ""

    def number(self):
        return f"{self.reached:,.0f}" if self.reached >= 1000 else f"{self.reached:.3g}" + self.unit()


class Result:
    def __init__(self, machine, rounds, quick, titles, runs, instructions):
        self.machine, self.rounds, self.quick, self.titles, self.runs, self.instructions = (
            machine, rounds, quick, titles, runs, instructions)
        self.medians = {
            figure: {system: {part: statistics.median(told[part] for told in list_of) for part in list_of[0]}
                     for system, list_of in systems.items()}
            for figure, systems in runs.items()
        }
        self.goals = [goal for goal in map(self.goal, *zip(*GOALS)) if goal]

    def goal(self, figure, part, against, at_least, bound):
        """None where it can't be told because something was not measured."""
        if figure == "instructions":
            return self.instructions and Goal(figure, part, against, at_least, bound, self.instructions)
        try:
            ours = self.medians[figure]["castra-batch" if against == "disk" else "castra"][part]
            if against is None:
                return Goal(figure, part, against, at_least, bound, ours)
            theirs = self.medians[against]["castra"] if against in self.medians else self.medians[figure][against]
            return Goal(figure, part, against, at_least, bound, ours / theirs[part])
        except KeyError:
            return None

    def head(self):
        named = self.machine
        versions = ", ".join(f"{NAMES[name]} {version}" for name, version in named["versions"].items())
        rounds = f"{self.rounds} alternating rounds, medians" if self.rounds > 1 else "1 round"
        quick = "; quick: shows that all works, proves nothing" if self.quick else ""
        return (f"castra's bus and its peers, 200-byte payloads, {rounds}{quick}\n"
                f"{named['cores']} cores ({named['cpu']}), shared with the generator; {named['system']}, Linux {named['kernel']}, "
                f"{named['filesystem']}\n{versions}")

    def figures_table(self):
        present = [system for system in SYSTEMS if any(system in told for told in self.medians.values())]
        lines = []
        for kind, part, heading, digits in COLUMNS:
            rows = [(figure, told) for figure, told in self.medians.items()
                    if figure.startswith(kind) and "castra" in told and part in told["castra"]]
            if not rows:
                continue
            lines.append(f"{heading:42}" + "".join(f"{NAMES[system]:>12}" for system in present))
            for figure, told in rows:
                cells = (f"{told[system][part]:,.{digits}f}" if system in told else "-" for system in present)
                lines.append(f"  {self.titles[figure]:40}" + "".join(f"{cell:>12}" for cell in cells))
        on_disk = self.medians.get("publish 1x64 on disk", {})
        if on_disk:
            lines.append("on disk before the ack, per second")
            lines += [f"  {'1 publisher x 64, sync = batch' if system == 'castra-batch' else 'appends of 64 lines with fdatasync':40}"
                      f"{told['per_second']:12,.0f}" for system, told in on_disk.items()]
        if self.instructions:
            lines.append(f"{'user instructions per publish, callgrind':42}{self.instructions:12,.0f}")
        return "\n".join(lines)

    def goals_table(self):
        lines = [f"{'castra':34}{'over':>12}{'whose ack:':>14}{'reached':>12}{'wanted':>12}"]
        for goal in self.goals:
            lines.append(f"{goal.title():34}{goal.over():>12}{goal.ack():>14}{goal.number():>12}{goal.wanted():>12}  "
                         + ("met" if goal.met else "NOT MET"))
        met = sum(goal.met for goal in self.goals)
        lines.append(f"{met} of {len(self.goals)} goals met; every delivery was checked for order and completeness: nothing was lost")
        return "\n".join(lines)

    def acks(self):
        measured = {system for told in self.medians.values() for system in told}
        return [(NAMES[system], meaning) for system, meaning in ACKS.items() if system in measured]

    def text(self):
        acks = "\n".join(f"  {name:15}{meaning}" for name, meaning in self.acks())
        return f"{self.head()}\n\n{self.figures_table()}\n\n{self.goals_table()}\n\nwhen a publisher sees its ack:\n{acks}"

    def data(self):
        return {
            "machine": self.machine,
            "rounds": self.rounds,
            "quick": self.quick,
            "acks": {system: meaning for system, meaning in ACKS.items()},
            "medians": self.medians,
            "instructions_per_publish": self.instructions,
            "goals": [{"figure": goal.figure, "part": goal.part, "over": goal.against, "at_least": goal.at_least,
                       "wanted": goal.bound, "reached": round(goal.reached, 4), "met": goal.met} for goal in self.goals],
            "all": self.runs,
        }

    def put_markdown(self, file, svg):
        acks = "\n".join(f"| {name} | {meaning} |" for name, meaning in self.acks())
        picture = f"![castra over its peers, each ratio beside its goal]({os.path.relpath(svg, file.parent)})\n\n" if svg else ""
        fragment = (f"```text\n{self.head()}\n\n{self.figures_table()}\n```\n\n{picture}```text\n{self.goals_table()}\n```\n\n"
                    f"| | when a publisher sees its ack |\n| --- | --- |\n{acks}\n")
        old = file.read_text() if file.exists() else ""
        if BEGIN in old and END in old:
            before, after = old.split(BEGIN)[0], old.split(END, 1)[1]
            fragment = f"{before}{BEGIN}{fragment}{END}{after}"
        file.write_text(fragment)

    def svg(self):
        """Bars on a logarithmic scale, all turned so that further right is better and the goal is one line."""
        row, left, right, top = 24, 330, 250, 84
        width, bars = 960, 960 - left - right
        # If a value is far beyond the goal, the number beside the bar tells it.
        low = max(0.1, min([0.25] + [goal.margin for goal in self.goals]))
        high = min(16, max([4] + [goal.margin for goal in self.goals]))
        place = lambda margin: left + bars * math.log(max(low, min(margin, high)) / low) / math.log(high / low)
        line = place(1)
        height = top + row * len(self.goals) + 44
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
            "<title>castra's bus over its peers, beside the goals</title>",
            # A background of its own, so that it can be read where the page's theme is not known.
            "<style>"
            "text{font:13px system-ui,sans-serif;fill:#1f2328}.small{font-size:11px;fill:#59636e}.head{font-size:16px;font-weight:600}"
            ".paper{fill:#ffffff}.met{fill:#1a7f64}.missed{fill:#c2571a}.goal{stroke:#1f2328}.grid{stroke:#d1d9e0}"
            "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9aa4af}.paper{fill:#0d1117}.met{fill:#3fb68b}"
            ".missed{fill:#f0883e}.goal{stroke:#e6edf3}.grid{stroke:#30363d}}"
            "</style>",
            f'<rect class="paper" width="{width}" height="{height}" rx="8"/>',
            '<text class="head" x="16" y="28">castra&#8217;s bus over its peers, beside the goals</text>',
            f'<text class="small" x="16" y="48">{escape(self.caption())}</text>',
        ]
        for margin in (0.25, 0.5, 2, 4, 8, 16):
            if low <= margin <= high:
                x = place(margin)
                parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{height - 36}"/>')
                parts.append(f'<text class="small" x="{x:.1f}" y="{top - 10}" text-anchor="middle">{margin:g}</text>')
        for index, goal in enumerate(self.goals):
            y = top + row * index
            x = place(goal.margin)
            over = f" / {goal.over()}" if goal.over() else ""
            sign = "≥" if goal.at_least else "≤"
            told = f"{goal.number().replace('x', '×')}  (goal {sign} {goal.bound:,g}{goal.unit().replace('x', '×')})"
            parts.append(f'<text x="{left - 12}" y="{y + 16}" text-anchor="end">{escape(goal.title().replace(" x ", " × ") + over)}</text>')
            parts.append(f'<rect class="{"met" if goal.met else "missed"}" x="{left}" y="{y + 4}" width="{max(x - left, 1):.1f}" '
                         f'height="{row - 8}" rx="2"/>')
            parts.append(f'<text x="{max(x, line) + 8:.1f}" y="{y + 16}">{escape(told)}</text>')
        parts.append(f'<line class="goal" x1="{line:.1f}" x2="{line:.1f}" y1="{top - 4}" y2="{height - 36}" stroke-width="1.5"/>')
        parts.append(f'<text class="small" x="{line:.1f}" y="{top - 10}" text-anchor="middle">goal</text>')
        parts.append(f'<text class="small" x="16" y="{height - 14}">'
                     "Reached divided by goal (or goal by reached, where less is better), logarithmic: right of the line, green: met.</text>")
        parts.append("</svg>")
        return "\n".join(parts) + "\n"

    def caption(self):
        named = self.machine
        return (f"{self.rounds} round{'s' if self.rounds != 1 else ''}, medians; {named['cores']} cores ({named['cpu']}), "
                f"Linux {named['kernel']}; " + ", ".join(f"{NAMES[name]} {version}" for name, version in named["versions"].items()))
