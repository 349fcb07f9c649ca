"""Makes the demo's small data sets: ``python -m demo.make_data``. A fixed seed; the output is committed.

``triage``: a support message is answered by one line of JSON with team and urgency.
``dates``: a date in words is answered in ISO 8601.
Held-out prompts never occur among the training prompts.
"""

from __future__ import annotations

import calendar
import datetime
import json
import random
from collections.abc import Callable
from pathlib import Path

DATA = Path(__file__).parent / "data"
NUM_TRAIN = 320
NUM_HELDOUT = 100

TROUBLES = {
    "billing": [
        "I was charged twice for {item}",
        "my invoice for {item} shows the wrong amount",
        "the refund for {item} never reached my bank",
        "you took money for {item} after I cancelled",
        "my card was declined although it is valid when I paid for {item}",
        "the discount code did not lower the price of {item}",
    ],
    "shipping": [
        "the parcel with {item} has not arrived",
        "tracking says {item} is still in the warehouse",
        "the courier left {item} at the wrong address",
        "{item} was sent to my old street",
        "the delivery of {item} was moved for the third time",
        "the box with {item} came open and empty",
    ],
    "account": [
        "I cannot log in to see my order of {item}",
        "my password reset mail never comes, I wanted to review {item}",
        "my profile shows somebody else's order of {item}",
        "I want to change the email address behind my order of {item}",
        "the second factor code is rejected when I open my order of {item}",
        "please delete my user profile, I only bought {item} once",
    ],
    "technical": [
        "{item} does not turn on",
        "{item} shows an error after the update",
        "the app crashes as soon as it finds {item}",
        "{item} loses its wireless connection every hour",
        "the screen of {item} flickers",
        "{item} makes a loud noise and gets hot",
    ],
}
ITEMS = [
    "a coffee grinder",
    "the blue lamp",
    "two headphones",
    "a garden hose",
    "the tablet",
    "a desk fan",
    "the smart scale",
    "a bike light",
    "the robot vacuum",
    "a rice cooker",
    "the baby monitor",
    "a label printer",
    "the doorbell camera",
    "a travel router",
]
URGENT = [
    "This cannot wait, I need it today.",
    "Please act at once!",
    "We have to stop work because of it.",
    "It is an emergency.",
    "I need an answer within the hour.",
    "Everything here is blocked until you fix this.",
]
CALM = [
    "No hurry at all.",
    "Whenever you find the time.",
    "It is only a small thing.",
    "Next week is fine for me.",
    "Just so that you know.",
    "There is no rush.",
]


def triage(rng: random.Random) -> tuple[str, str]:
    team = rng.choice(sorted(TROUBLES))
    urgent = rng.random() < 0.5
    trouble = rng.choice(TROUBLES[team]).format(item=rng.choice(ITEMS))
    mood = rng.choice(URGENT if urgent else CALM)
    text = (
        f"{mood} {trouble[0].upper()}{trouble[1:]}."
        if rng.random() < 0.5
        else f"{trouble[0].upper()}{trouble[1:]}. {mood}"
    )
    answer = json.dumps({"team": team, "urgency": "high" if urgent else "low"})
    return f"Triage this message: {text}", answer


def dates(rng: random.Random) -> tuple[str, str]:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(100 * 365))
    month = calendar.month_name[day.month]
    suffix = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    words = rng.choice(
        [
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month} {day.year}",
            f"the {day.day}{suffix} of {month} {day.year}",
        ]
    )
    return f"Write this date as ISO 8601: {words}", day.isoformat()


def _conversation(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def make(name: str, example: Callable[[random.Random], tuple[str, str]]) -> None:
    rng = random.Random(f"mint demo {name}")
    seen: dict[str, str] = {}
    while len(seen) < NUM_TRAIN + NUM_HELDOUT:
        prompt, completion = example(rng)
        seen.setdefault(prompt, completion)
    pairs = list(seen.items())
    for part, chosen in (("train", pairs[:NUM_TRAIN]), ("heldout", pairs[NUM_TRAIN:])):
        lines = [json.dumps({"messages": _conversation(prompt, answer)}) for prompt, answer in chosen]
        (DATA / f"{name}_{part}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    make("triage", triage)
    make("dates", dates)
