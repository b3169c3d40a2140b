// The page: pictures wait in the tray, a conversation grows in `messages`, one answer runs at a time.
// Everything that a model or a person wrote enters the document as text, never as HTML.

import { ApiError, ask, config, sendOpinion, settings, useKey, whereItLooked } from "/page/api.js";
import { $, say, trouble } from "/page/dom.js";
import { overlay } from "/page/overlay.js";
import * as tray from "/page/tray.js";

const SAMPLES = [
  { file: "cat.jpg", name: "A cat", question: "What animal is this?" },
  { file: "coffee.jpg", name: "A cup of coffee", question: "What is in the cup?" },
  { file: "astronaut.jpg", name: "An astronaut", question: "What is she wearing?" },
  { file: "rocket.jpg", name: "A rocket", question: "Describe the picture." },
];

const WRONG_KEY = "That key does not open this server.";
let messages = [];
let running = null;
let attempts = 0;
const choosing = new Set();

const written = (m) => (Array.isArray(m.content) ? m.content.map((p) => p.text ?? "").join("") : m.content);
const sent = () => messages.flatMap((m) => (Array.isArray(m.content) ? m.content : [])).filter((p) => p.image_url);

// --- the conversation ------------------------------------------------------------------------------

function fromTemplate(id) {
  const piece = $(`#${id}`).content.firstElementChild.cloneNode(true);
  $("#talk").append(piece);
  return piece;
}

function askNow(event) {
  event?.preventDefault();
  const words = $("#question").value.trim();
  if (running) return;
  if (!words) return trouble("Type a question first.");
  if (tray.unready()) return;
  if (!tray.waiting() && !sent().length) return trouble("Add a picture first.");
  if ([...messages.map(written), words].join("").length > config.max_text) {
    return trouble(`One conversation can hold ${config.max_text} characters. Ask in fewer words, or start anew.`);
  }
  trouble("");
  goOn();
  const pictures = tray.take();
  const turn = fromTemplate("question-template");
  $(".thumbs", turn).replaceChildren(...pictures.map((item) => tray.thumb(item)));
  $(".words", turn).textContent = words;
  const parts = pictures.map((item) => ({ type: "image_url", image_url: { url: item.url } }));
  messages.push({ role: "user", content: [...parts, { type: "text", text: words }] });
  $("#question").value = "";
  $("#samples").hidden = true;
  $("#fresh").hidden = false;
  answer(fromTemplate("answer-template"), { words, pictures });
}

// What failed before can no longer be asked in its place.
function goOn() {
  for (const button of document.querySelectorAll(".again, .change")) button.hidden = true;
}

function takeBack({ words, pictures }) {
  goOn();
  trouble("");
  pictures.forEach(tray.put);
  const field = $("#question");
  if (!field.value.trim()) field.value = words;
  field.focus();
}

// A button that hides takes the keyboard's place with it: it goes to Stop, then back to the question.
function busy(controller) {
  const held = document.activeElement;
  running = controller;
  $("#stop").hidden = !controller;
  $("#send").hidden = Boolean(controller);
  if (held?.closest("[hidden]")) $(controller ? "#stop" : "#question").focus({ preventScroll: true });
}

async function answer(turn, question) {
  const asked = [...messages];
  const controller = new AbortController();
  const words = $(".words", turn);
  words.textContent = "";
  $(".note", turn).hidden = $(".cut", turn).hidden = $(".tools", turn).hidden = true;
  turn.setAttribute("aria-busy", "true");
  turn.scrollIntoView({ block: "nearest" });
  busy(controller);
  say("Answering");
  let problem = null;
  let ended = null;
  try {
    if (!config.model) await getSettings(controller.signal);
    ended = await ask(asked, controller.signal, (text) => (words.textContent += text));
  } catch (caught) {
    problem = caught;
  }
  turn.removeAttribute("aria-busy");
  if (running === controller) busy(null);
  if (asked.at(-1) !== messages.at(-1)) return; // started anew meanwhile
  finish(turn, question, asked, words.textContent, problem, ended);
}

function showNote(turn, text, problem, ended) {
  const note = $(".note", turn);
  const cut = $(".cut", turn);
  if (problem) note.textContent = problem.name === "AbortError" ? "Stopped." : problem.message;
  else if (!text) note.textContent = "No answer.";
  note.hidden = !problem && text !== "";
  cut.hidden = !note.hidden || ended !== "length";
  say(note.hidden ? `Answer: ${text}${cut.hidden ? "" : `\n${cut.textContent}`}` : note.textContent);
}

function finish(turn, question, asked, text, problem, ended) {
  const stopped = problem?.name === "AbortError";
  if (problem instanceof ApiError && problem.status === 401) askForKey(config.model ? WRONG_KEY : "");
  const whole = !problem || (stopped && text);
  // A question that failed leaves the conversation, so that what was wrong with it does not spoil the next.
  // One that got no words stays, for its pictures.
  if (!whole) messages.pop();
  else if (text) messages.push({ role: "assistant", content: text });
  $(".again", turn).hidden = whole || problem.code === "invalid_image";
  $(".again", turn).onclick = () => {
    messages.push(asked.at(-1));
    answer(turn, question);
  };
  $(".change", turn).hidden = whole;
  $(".change", turn).onclick = () => takeBack(question);
  $(".tools", turn).hidden = false;
  $(".copy", turn).hidden = !text;
  $(".copy", turn).onclick = () => copy(text);
  for (const name of ["up", "down"]) {
    $(`.${name}`, turn).hidden = !(config.feedback && whole && text);
    $(`.${name}`, turn).onclick = () => openOpinion(turn, asked, text, name);
  }
  const look = $(".look", turn);
  look.hidden = !(config.attention && whole && text);
  look.onclick = () => showLook(turn, asked, text);
  showNote(turn, text, problem, ended);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
  } catch {
    trouble("The browser does not allow copying here.");
  }
}

function startAnew() {
  running?.abort();
  busy(null);
  messages = [];
  tray.empty();
  trouble("");
  $("#talk").replaceChildren();
  $("#samples").hidden = false;
  $("#fresh").hidden = true;
  $("#question").focus();
}

// --- opinions and attention --------------------------------------------------------------------------

function openOpinion(turn, asked, text, verdict) {
  const form = $(".opinion", turn);
  if (form.ariaBusy) return;
  const field = $("input", form);
  for (const name of ["up", "down"]) $(`.${name}`, turn).setAttribute("aria-pressed", String(name === verdict));
  $(".correct", form).hidden = verdict === "up";
  form.hidden = false;
  form.scrollIntoView({ block: "nearest" });
  (verdict === "up" ? $(".primary", form) : field).focus();
  const close = () => {
    form.hidden = true;
    $(`.${verdict}`, turn).focus();
  };
  $(".cancel", form).onclick = () => {
    if (form.ariaBusy) return;
    $(`.${verdict}`, turn).setAttribute("aria-pressed", "false");
    close();
  };
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (form.ariaBusy) return; // pressed twice: one opinion
    form.ariaBusy = "true";
    const correction = verdict === "down" ? field.value.trim() || null : null;
    const thanks = $(".thanks", turn);
    try {
      await sendOpinion({ consent: true, model: config.model, messages: asked, answer: text, verdict, correction });
      thanks.textContent = "Thank you. Your opinion is stored.";
      close();
      for (const name of ["up", "down"]) $(`.${name}`, turn).disabled = true;
    } catch (problem) {
      thanks.textContent = problem.message;
    }
    form.ariaBusy = null;
    thanks.hidden = false;
    say(thanks.textContent);
  };
}

async function showLook(turn, asked, text) {
  const place = $(".looked", turn);
  const button = $(".look", turn);
  if (!place.childElementCount) {
    button.disabled = true;
    try {
      const { images } = await whereItLooked({ model: config.model, messages: asked, answer: text });
      const urls = asked.flatMap((m) => (Array.isArray(m.content) ? m.content : [])).filter((p) => p.image_url);
      place.replaceChildren(...(await Promise.all(images.map((map, i) => overlay(urls[i].image_url.url, map)))));
    } catch (problem) {
      trouble(problem.message);
    }
    button.disabled = false;
  }
  place.hidden = !place.hidden;
  button.setAttribute("aria-pressed", String(!place.hidden));
  turn.scrollIntoView({ block: "nearest" });
}

// --- start -----------------------------------------------------------------------------------------

function askForKey(note) {
  $("#key-form").hidden = false;
  if (note) $("#key-note").textContent = note;
  $("#key").focus();
}

async function getSettings(signal) {
  await settings(signal);
  $("#model").textContent = config.model;
  $("#key-form").hidden = true;
}

// Of several attempts, as when a second key is typed before the first is refused, the last one counts.
async function connect() {
  const attempt = ++attempts;
  try {
    await getSettings();
  } catch (problem) {
    if (attempt !== attempts) return;
    if (problem.status === 401) askForKey(attempt > 1 ? WRONG_KEY : "");
    else trouble(problem.message);
  }
}

// A second click on the same sample adds nothing, and none changes a question that was typed.
async function choose({ file, name, question }) {
  if (choosing.has(name)) return;
  choosing.add(name);
  const there = tray.holds(name) || (await tray.addSample(file, name));
  choosing.delete(name);
  if (!there) return;
  const field = $("#question");
  if (!field.value.trim() || SAMPLES.some((sample) => sample.question === field.value)) field.value = question;
  field.focus();
}

function showSamples() {
  const entries = SAMPLES.map((sample) => {
    const entry = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    const image = document.createElement("img");
    image.src = `/page/samples/${sample.file}`;
    image.alt = "";
    const words = document.createElement("span");
    words.textContent = sample.name;
    button.append(image, words);
    button.addEventListener("click", () => choose(sample));
    entry.append(button);
    return entry;
  });
  $(".samples").replaceChildren(...entries);
}

function listen() {
  $("#ask").addEventListener("submit", askNow);
  $("#question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) askNow(event);
  });
  $("#stop").addEventListener("click", () => running?.abort());
  $("#fresh").addEventListener("click", startAnew);
  $("#choose").addEventListener("click", () => $("#files").click());
  $("#files").addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // so that the same file can be chosen again
    tray.addFiles(files);
  });
  $("#key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const usable = useKey($("#key").value.trim());
    $("#key").value = "";
    if (usable) connect();
    else askForKey(WRONG_KEY);
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) {
      event.preventDefault();
      tray.addFiles(files);
    }
  });
  listenToDrops();
  tray.listenToCamera();
}

function listenToDrops() {
  const carriesFiles = (event) => [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!carriesFiles(event)) return;
    event.preventDefault();
    tray.addFiles([...event.dataTransfer.files]);
  });
}

tray.countWith(() => sent().length);
listen();
showSamples();
connect();
