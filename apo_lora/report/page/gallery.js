"use strict";
// Turns the data of the page into cards, by textContent alone: whatever a model wrote stays text.

const CARDS_AT_ONCE = 24;
const MATCHES = {
  all: () => true,
  right: (item) => item.isRight,
  wrong: (item) => !item.isRight,
  changed: (item) => item.outcome === "fixed" || item.outcome === "broken",
  fixed: (item) => item.outcome === "fixed",
  broken: (item) => item.outcome === "broken",
};
const BADGES = {
  right: ["✓ right", "is-good"],
  wrong: ["✗ wrong", "is-bad"],
  fixed: ["✗→✓ fixed", "is-good"],
  broken: ["✓→✗ broken", "is-bad"],
};

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("gallery-data").textContent);
const radios = [...document.querySelectorAll("#filters input")];
let matching = [];
let numShown = 0;

function fill(parent, selector, text) {
  const element = parent.querySelector(selector);
  element.textContent = text;
  return element;
}

function setBadge(parent, outcome) {
  const [text, style] = BADGES[outcome];
  fill(parent, ".badge", text).classList.add(style);
}

function answerElement(answer, heading) {
  const element = byId("answer").content.cloneNode(true);
  fill(element, ".model", answer.model);
  setBadge(element, answer.isRight ? "right" : "wrong");
  fill(element, ".length", answer.length === null ? "" : `${answer.length} tokens${answer.truncated ? ", cut" : ""}`);
  if (answer.answer === null) element.querySelector(".said").remove();
  else fill(element, ".said-text", answer.answer);
  fill(element, ".text", answer.text).setAttribute("aria-label", `${heading}: text of ${answer.model}`);
  fill(element, ".facts", answer.facts.join(" · "));
  return element;
}

function pictureElement(place) {
  if (place === null) {
    const note = document.createElement("p");
    note.className = "quiet";
    note.textContent = "The picture is gone, or cannot be read.";
    return note;
  }
  const image = document.createElement("img");
  image.src = data.pictures[place];
  image.alt = "picture of the problem";
  return image;
}

function cardElement(item) {
  const card = byId("card").content.cloneNode(true);
  fill(card, "h3", item.heading);
  setBadge(card, item.outcome);
  card.querySelector(".pictures").append(...item.pictures.map(pictureElement));
  fill(card, ".problem", item.problem);
  fill(card, ".gold", item.gold);
  for (const choice of item.choices ?? []) {
    const line = document.createElement("li");
    line.textContent = choice;
    card.querySelector(".choices").append(line);
  }
  card.querySelector(".answers").append(...item.answers.map((answer) => answerElement(answer, item.heading)));
  return card;
}

function showMore() {
  const next = matching.slice(numShown, numShown + CARDS_AT_ONCE);
  byId("cards").append(...next.map(cardElement));
  numShown += next.length;
  byId("more").hidden = numShown >= matching.length;
  byId("shown").textContent = matching.length
    ? `${numShown} of ${matching.length} shown`
    : "There is nothing to show here.";
}

function searched(items) {
  const words = byId("search").value.trim().toLowerCase();
  const texts = (item) => [item.heading, item.problem, item.gold, ...item.answers.map((answer) => answer.text)];
  return words ? items.filter((item) => texts(item).some((text) => text.toLowerCase().includes(words))) : items;
}

function update() {
  const found = searched(data.sources[byId("source").value]?.items ?? []);
  for (const radio of radios) {
    radio.parentElement.querySelector(".count").textContent = found.filter(MATCHES[radio.value]).length;
  }
  matching = found.filter(MATCHES[radios.find((radio) => radio.checked).value]);
  numShown = 0;
  byId("cards").replaceChildren();
  showMore();
}

function sayCoverage() {
  const { items, total } = data.sources[byId("source").value] ?? { items: [], total: 0 };
  byId("coverage").textContent =
    items.length < total ? `${items.length} of ${total} recorded fit into this page, some of every outcome.` : "";
}

byId("source").closest("label").hidden = data.sources.length < 2;
byId("source").addEventListener("change", () => {
  sayCoverage();
  update();
});
byId("filters").addEventListener("change", update);
byId("search").addEventListener("input", update);
byId("more").addEventListener("click", () => {
  const first = numShown;
  showMore();
  byId("cards").children[first]?.querySelector("pre")?.focus(); // the button may be gone: keep the keyboard's place
});
byId("controls").hidden = false;
sayCoverage();
update();
