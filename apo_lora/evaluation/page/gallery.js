"use strict";
// Shows the items that match the controls, some at a time. Without this script, all of them are shown.

const ITEMS_AT_ONCE = 24;
const SEARCHED = "h4, .problem, .gold, .text";

const byId = (id) => document.getElementById(id);
const sources = [...document.querySelectorAll(".items")];
const radios = [...document.querySelectorAll("#filters input")];
let matching = [];
let numShown = 0;

const texts = new Map(); // filled when something is searched

function textOf(item) {
  if (!texts.has(item)) {
    const parts = [...item.querySelectorAll(SEARCHED)].map((element) => element.textContent);
    texts.set(item, parts.join("\n").toLowerCase());
  }
  return texts.get(item);
}

const passes = (item, radio) => radio.dataset.outcomes.split(" ").includes(item.dataset.outcome);

function showMore() {
  const next = matching.slice(numShown, numShown + ITEMS_AT_ONCE);
  for (const item of next) item.classList.add("shown");
  numShown += next.length;
  byId("more").hidden = numShown >= matching.length;
  byId("shown").textContent = matching.length
    ? `${numShown} of ${matching.length} shown`
    : "No matching answers.";
}

function update() {
  const chosen = sources[byId("source").value];
  for (const source of sources) source.hidden = source !== chosen;
  const items = [...(chosen?.querySelectorAll(".item") ?? [])];
  const words = byId("search").value.trim().toLowerCase();
  const found = words ? items.filter((item) => textOf(item).includes(words)) : items;
  for (const radio of radios) {
    radio.parentElement.querySelector(".count").textContent = found.filter((item) => passes(item, radio)).length;
  }
  const checked = radios.find((radio) => radio.checked);
  matching = found.filter((item) => passes(item, checked));
  numShown = 0;
  for (const item of document.querySelectorAll(".shown")) item.classList.remove("shown");
  showMore();
}

byId("source").closest("label").hidden = sources.length < 2;
for (const id of ["source", "filters"]) byId(id).addEventListener("change", update);
byId("search").addEventListener("input", update);
byId("more").addEventListener("click", () => {
  const first = numShown;
  showMore();
  matching[first]?.querySelector("pre")?.focus(); // the button may be gone: keep the keyboard's place
});
byId("controls").hidden = false;
update();
