"""Write the demo: a training corpus and six small tasks about a made-up world of everyday scenes.

    python demo/generate.py

A scene is (topic, person, action, object, place, polarity). A sentence is one of many ways to say it: a synonym or
a hypernym for each slot, one of nine forms, now and then a distracting detail. Scores and labels follow from the
scenes alone, so the words that two sentences share say little about them: a paraphrase may share no content word with
its partner, and a negative may share all but one.

In-domain tasks are drawn like the corpus. Out-of-domain tasks use three sentence forms and the (action, object) pairs
that the corpus never has; every word of theirs occurs in the corpus.
"""

import json
import random
import re
from pathlib import Path

# topic: people; actions, each with the objects it applies to; objects; places. Words between slashes are synonyms;
# before ":" stands the hypernym of the people or of the objects, or the preposition of the places.
WORLD = """
cooking
  kitchener: chef/cook/caterer, baker/confectioner/patissier, waiter/server/steward
  slice/carve/divide 0 1 3, warm/heat/reheat 2 1 0, season/spice/flavour 1 2 4, serve/offer/present 3 4 2, taste/sample/try 4 3 0
  food: bread/loaf/baguette, meat/beef/steak, soup/broth/stew, cake/tart/pie, salad/lettuce/coleslaw
  in: kitchen/galley, restaurant/diner/bistro, market/bazaar
gardening
  grower: gardener/groundskeeper/landscaper, farmer/planter/cultivator, florist/horticulturist
  water/sprinkle/irrigate 0 3 4, prune/shear/shorten 2 1 4, transplant/move/relocate 0 1 2, fertilise/nurture/nourish 3 0 1, inspect/examine/check 4 2 3
  plant: rose/tulip/lily, tree/oak/willow, hedge/bush/shrub, grass/lawn/turf, vine/creeper/ivy
  in: garden/yard/backyard, greenhouse/conservatory, park/meadow/field
medicine
  medic: doctor/physician/clinician, nurse/caregiver/orderly, surgeon/specialist
  sterilise/disinfect/clean 2 3 0, prescribe/recommend/order 1 4 0, unseal/unpack/open 0 1 2, inspect/examine/study 4 3 1, discard/trash/junk 2 3 4
  remedy: bandage/dressing/plaster, pill/tablet/capsule, syringe/needle, scalpel/lancet/blade, scan/radiograph
  in: hospital/clinic/infirmary, ward/sickroom, pharmacy/drugstore/dispensary
school
  academic: teacher/instructor/tutor, pupil/student/learner, librarian/archivist
  study/review/examine 0 3 2, copy/transcribe/reproduce 2 1 3, mark/grade/assess 1 4 2, explain/discuss/clarify 2 0 4, borrow/fetch/collect 0 3 4
  text: book/novel/volume, essay/paper/composition, poem/verse/sonnet, atlas/map, exam/test/quiz
  in: classroom/schoolroom, library/archive, auditorium/hall
music
  musician: violinist/fiddler, pianist/keyboardist, drummer/percussionist
  play/perform/sound 0 3 1, adjust/tune/calibrate 1 0 2, polish/wipe/clean 4 2 1, record/tape/capture 3 4 0, practise/rehearse/repeat 3 2 4
  instrument: violin/fiddle/viola, piano/keyboard/organ, drum/cymbal, melody/song/anthem, trumpet/horn/bugle
  in: theatre/stage, studio/booth, club/bar/tavern
building
  builder: carpenter/joiner/woodworker, plumber/pipefitter, painter/decorator
  repair/mend/fix 1 2 3, paint/coat/varnish 0 1 4, install/mount/assemble 4 2 1, measure/gauge/survey 0 3 4, remove/dismantle/detach 2 0 3
  fixture: wall/partition/panel, door/gate/hatch, pipe/tube/duct, roof/ceiling, window/pane/skylight
  in: house/home/cottage, factory/mill/workshop, office/bureau
sailing
  mariner: captain/skipper/commander, sailor/seaman/deckhand, fisherman/angler
  lower/release/unload 2 1 4, haul/pull/hoist 1 3 2, fasten/tether/secure 0 3 4, wash/rinse/clean 0 1 4, inspect/check/survey 3 4 0
  gear: boat/vessel/ship, net/mesh, anchor/mooring, rope/cable/line, sail/canvas
  at: harbour/port/dock, coast/shore/beach, island/reef
sport
  athlete: runner/sprinter/jogger, goalkeeper/goalie, coach/trainer/manager
  kick/boot/punt 0 3 2, lift/raise/hoist 1 2 4, collect/gather/fetch 3 0 4, polish/clean/wipe 1 2 3, toss/hurl/launch 4 0 1
  kit: ball/football, trophy/medal/award, racket/paddle, shoe/sneaker/cleat, towel/jersey/vest
  at: stadium/arena, gym/gymnasium, track/racecourse
"""
RARE = {  # many rare words: distractors that no scene explains
    "near a": "lamp bench clock mirror ladder basket candle barrel bucket carpet curtain cupboard statue fountain radio kettle pillow blanket "
    "bottle fence bicycle wagon tractor lantern suitcase parcel newspaper painting puddle shadow stove drawer bell flag balloon puppet",
    "with some": "patience luck courage irony humour pride regret envy doubt hope delight caution sorrow relief kindness anger grace skill "
    "boredom curiosity reluctance enthusiasm hesitation sympathy",
    "on a": "monday tuesday wednesday thursday friday saturday sunday morning afternoon evening holiday birthday rainy snowy windy foggy "
    "sunny cloudy frosty stormy",
    "while": "everybody sleeps|thunder rumbles|children laugh|dogs bark|birds sing|traffic roars|phones ring|snow falls|leaves rustle|"
    "crowds cheer|engines hum|bees buzz|cats quarrel|kids giggle|strangers whisper|lights flicker",
}
OPENINGS = [
    "it is said that",
    "there is a rumour that",
    "as expected,",
    "according to the news,",
    "one winter day,",
    "in short,",
]

FORMS = {  # {p}erson, {v}erb present, {ed} past, {ing}, {o}bject, {l}ocation
    "active": "{p} {v} {o} {l}",
    "past": "{p} {ed} {o} {l}",
    "passive": "{o} is {ed} by {p} {l}",
    "progressive": "{p} is {ing} {o} {l}",
    "fronted": "{l} {p} {v} {o}",
    "relative": "{p} who is {l} {v} {o}",
    "cleft": "it is {o} that {p} {v} {l}",
    "existential": "there is {p} {l} {ing} {o}",
    "object relative": "{l} is {o} that is {ed} by {p}",
}
NEGATED = {"active": "{p} never {v} {o} {l}", "past": "{p} never {ed} {o} {l}", "passive": "{o} is not {ed} by {p} {l}",
           "progressive": "{p} is not {ing} {o} {l}", "fronted": "{l} {p} never {v} {o}",
           "relative": "{p} who is {l} never {v} {o}", "cleft": "it is not {o} that {p} {v} {l}",
           "existential": "there is {p} {l} not {ing} {o}", "object relative": "{l} is {o} that is not {ed} by {p}"}  # fmt: skip
NEW_FORMS = ["cleft", "existential", "object relative"]
SOURCES = {
    "topics": ["active", "past", "fronted", "relative"],
    "paraphrases": list(FORMS)[:6],
    "captions": ["progressive", "passive", "fronted"],
}


def parse_world():
    """WORLD as a list of dicts: name, people, actions [(synonyms, objects)], objects, places, and the two hypernyms."""
    topics = []
    lines = WORLD.strip().splitlines()
    for name, people, actions, objects, places in zip(*(lines[i::5] for i in range(5))):
        split = lambda text: [concept.split("/") for concept in text.strip().split(", ")]
        verbs = [action.split() for action in actions.strip().split(", ")]
        (person_is, people), (object_is, objects), (at, places) = (
            line.strip().split(": ") for line in (people, objects, places)
        )
        topics.append({
            "name": name, "person": split(people), "object": split(objects), "place": split(places),
            "action": [(verb.split("/"), [int(i) for i in where]) for verb, *where in verbs],
            "person_is": person_is, "object_is": object_is, "at": at,
        })  # fmt: skip
    return topics


TOPICS = parse_world()
DETAILS = {start: words.split("|" if "|" in words else " ") for start, words in RARE.items()}


def draw_scene(rng, new, topic=None):
    """A random scene. `new` picks the (action, object) pairs that the corpus leaves out: the first of each action."""
    topic = rng.randrange(len(TOPICS)) if topic is None else topic
    world = TOPICS[topic]
    action = rng.randrange(len(world["action"]))
    objects = world["action"][action][1]
    thing = objects[0] if new else rng.choice(objects[1:])
    return {
        "topic": topic, "action": action, "object": thing,
        "person": (action + rng.randrange(2)) % len(world["person"]), "place": (thing + rng.randrange(2)) % len(world["place"]),
        "negated": rng.random() < 0.1,
    }  # fmt: skip


def change(rng, scene, slots, new):
    """The scene with exactly these slots changed, within its topic. Raises LookupError where the world has no such scene."""
    for _ in range(200):
        other = draw_scene(rng, new, scene["topic"])
        if all(
            (other[slot] != scene[slot]) == (slot in slots)
            for slot in ("person", "action", "object", "place")
        ):
            return other | {"negated": scene["negated"]}
    raise LookupError


def inflect(verb):
    """Present, past and progressive of a regular verb: carve -> carves, carved, carving."""
    stem = verb[:-1] if verb.endswith("e") else verb
    y = re.search("[^aeiou]y$", verb)
    present = verb[:-1] + "ies" if y else verb + ("es" if re.search("(s|sh|ch|x)$", verb) else "s")
    return present, verb[:-1] + "ied" if y else stem + "ed", stem + "ing"


def say(rng, scene, forms):
    """One of the many sentences that describe the scene."""
    world = TOPICS[scene["topic"]]
    noun = {}
    for slot in ("person", "object"):  # a hypernym now and then, where it still fits the scene
        synonyms = world[slot][scene[slot]]
        noun[slot] = world[f"{slot}_is"] if rng.random() < 0.05 else rng.choice(synonyms)
    noun["place"] = rng.choice(world["place"][scene["place"]])
    verb, past, progressive = inflect(rng.choice(world["action"][scene["action"]][0]))
    person, thing, place = (
        rng.choice(["the", "the", "a" if word[0] not in "aeiou" else "an"]) + " " + word
        for word in noun.values()
    )
    template = (NEGATED if scene["negated"] else FORMS)[rng.choice(forms)]
    sentence = template.format(
        p=person, v=verb, ed=past, ing=progressive, o=thing, l=f"{world['at']} {place}"
    )
    if rng.random() < 0.5:
        start = rng.choice(list(DETAILS))
        sentence += f" {start} {rng.choice(DETAILS[start])}"
    if rng.random() < 0.2:
        sentence = rng.choice(OPENINGS) + " " + sentence
    return sentence[0].upper() + sentence[1:] + "."


def similarity(a, b):
    """Graded similarity of two scenes, 0 to 5: the weight of the slots that agree, siblings a little, halved by a negation."""
    if a["topic"] != b["topic"]:
        return 0.0
    weights = {"person": 1.0, "action": 1.5, "object": 1.5, "place": 1.0}
    score = sum(weight * (1.0 if a[slot] == b[slot] else 0.2) for slot, weight in weights.items())
    return round(score * (0.5 if a["negated"] != b["negated"] else 1.0), 2)


def draw_pair(rng, new, changes):
    """Two scenes, `changes` slots apart; 5 changes is another topic."""
    while True:
        scene = draw_scene(rng, new)
        if changes == 5:
            return scene, draw_scene(
                rng, new, rng.choice([t for t in range(len(TOPICS)) if t != scene["topic"]])
            )
        try:
            return scene, change(
                rng, scene, rng.sample(["person", "action", "object", "place"], changes), new
            )
        except LookupError:
            continue  # an action and its only object cannot change apart


def classification(rng, say_new, new, rows):
    """Topic labels: rows of {text, label}."""
    scenes = [draw_scene(rng, new, i % len(TOPICS)) for i in range(rows)]
    return [{"text": say_new(scene), "label": TOPICS[scene["topic"]]["name"]} for scene in scenes]


def paraphrases(rng, say_new, new, rows):
    """Same scene or not: rows of {sentence1, sentence2, label}; a negative differs in one or two slots or in polarity."""
    pairs = []
    for i in range(rows):
        a, b = draw_pair(rng, new, 0 if i % 2 else rng.choice([1, 2, 2, 3]))
        if not i % 2 and rng.random() < 0.1:
            b = a | {"negated": not a["negated"]}
        pairs.append({"sentence1": say_new(a), "sentence2": say_new(b), "label": i % 2})
    return pairs


def graded(rng, say_new, new, rows):
    """Graded similarity: rows of {sentence1, sentence2, score}."""
    pairs = [draw_pair(rng, new, rng.choice([0, 1, 2, 2, 3, 3, 4, 5])) for _ in range(rows)]
    return [
        {"sentence1": say_new(a), "sentence2": say_new(b), "score": similarity(a, b)}
        for a, b in pairs
    ]


def write(path, rows):
    """Write rows, dicts, to a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tasks(out, rng, corpus):
    """Write the six tasks, none of whose sentences the corpus has."""
    tasks = {
        "topics": (classification, SOURCES["topics"], False), "paraphrases": (paraphrases, SOURCES["paraphrases"], False),
        "captions": (graded, SOURCES["captions"], False), "new-topics": (classification, NEW_FORMS, True),
        "new-paraphrases": (paraphrases, NEW_FORMS, True), "new-captions": (graded, NEW_FORMS, True),
    }  # fmt: skip
    for name, (kind, forms, new) in tasks.items():

        def say_new(scene, forms=forms):
            """A sentence that the corpus does not have."""
            while (sentence := say(rng, scene, forms)) in corpus:
                pass
            return sentence

        if kind is classification:
            write(out / name / "train.jsonl", kind(rng, say_new, new, 64))
        write(out / name / "test.jsonl", kind(rng, say_new, new, 600))


def main(out=Path(__file__).parent, sentences=6000):
    """Write corpus.jsonl, tasks.json and a folder a task under `out`."""
    rng = random.Random(0)
    corpus = {}  # sentence -> source; a dict keeps the order and drops repeats
    while len(corpus) < sentences:
        source = list(SOURCES)[len(corpus) % len(SOURCES)]
        corpus.setdefault(say(rng, draw_scene(rng, new=False), SOURCES[source]), source)
    write(
        out / "corpus.jsonl", [{"text": text, "source": source} for text, source in corpus.items()]
    )
    write_tasks(out, rng, corpus)
    (out / "tasks.json").write_text(
        json.dumps({"in_domain": ["topics", "paraphrases", "captions"]}) + "\n"
    )


if __name__ == "__main__":
    main()
