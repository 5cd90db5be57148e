// What is served, as a list to choose from and as a few words.

import { el } from "./dom.js";

/** The options of a select: models, each with its adapters behind it; where there are several models, in groups. */
export function modelOptions(models, chosen) {
  const options = new Map(models.map((model) => [model.id, el("option", { value: model.id }, labelOf(model))]));
  const bases = models.filter(({ parent }) => !parent);
  const known = options.has(chosen) ? [] : [missing(chosen)];
  if (bases.length < 2) return [...known, ...options.values()];
  const groups = bases.map(({ id }) => {
    const members = models.filter((model) => model.id === id || model.parent === id);
    return el(
      "optgroup",
      { label: id },
      members.map((model) => options.get(model.id)),
    );
  });
  return [...known, ...groups];
}

/** A model that isn't served any more stays visible as such. */
function missing(id) {
  return el("option", { value: id }, id ? `${id} (not served)` : "no model");
}

function labelOf(model) {
  if (hasStep(model)) return `${model.id} · step ${model.step}`;
  return model.adapter ? `${model.id} (adapter)` : model.id;
}

/** Whether a model is the adapter of a run, whose newer checkpoints it becomes. */
export function isFollowed({ step }) {
  return step !== undefined;
}

/** Whether it is one of these checkpoints already. */
export function hasStep({ step }) {
  return typeof step === "number";
}

/** One line about a model. */
export function factsOf(model, about) {
  const kind = model.adapter ? `adapter of ${model.parent}` : "model";
  const now = hasStep(model) ? `step ${model.step}, newer ones as they come` : "its run's checkpoints as they come";
  const facts = [kind, isFollowed(model) && now, `${model.length.toLocaleString("en")} tokens of context`, about.dtype];
  return facts.filter(Boolean).join(" · ");
}
