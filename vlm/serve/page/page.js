// The page: pictures wait in `pending`, a conversation grows in `messages`, one answer runs at a time.
// Everything that a model or a person wrote enters the document as text, never as HTML.

import { ApiError, ask, sendOpinion, settings, useKey, whereItLooked } from "/page/api.js";
import { photograph, picture } from "/page/pictures.js";
import { overlay } from "/page/overlay.js";

const $ = (selector, within = document) => within.querySelector(selector);
const SAMPLES = [
  { file: "cat.jpg", name: "A cat", question: "What animal is this?" },
  { file: "coffee.jpg", name: "A cup of coffee", question: "What is in the cup?" },
  { file: "astronaut.jpg", name: "An astronaut", question: "What is she wearing?" },
  { file: "rocket.jpg", name: "A rocket", question: "Describe the picture." },
];

const WRONG_KEY = "That key does not open this server.";
const MIB = 1 << 20;
let config = {
  model: "", feedback: false, attention: false,
  max_images: 8, max_image_bytes: 20 * MIB, max_body: 32 * MIB, max_text: 32000,
};
let messages = [];
let pending = [];
let running = null;
let attempts = 0;

const say = (text) => ($("#status").textContent = text);
const trouble = (text) => ($("#trouble").textContent = text);
const written = (m) => (Array.isArray(m.content) ? m.content.map((p) => p.text ?? "").join("") : m.content);
const sent = () => messages.flatMap((m) => (Array.isArray(m.content) ? m.content : [])).filter((p) => p.image_url);

// --- pictures ------------------------------------------------------------------------------------

function thumb(item, remove) {
  const entry = document.createElement("li");
  const image = document.createElement("img");
  image.src = item.url;
  image.alt = item.name;
  entry.append(image);
  if (remove) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "×";
    button.setAttribute("aria-label", `Remove ${item.name}`);
    button.addEventListener("click", remove);
    entry.append(button);
  }
  return entry;
}

function showPending() {
  const remove = (item) => () => {
    pending = pending.filter((other) => other !== item);
    showPending();
    $("#choose").focus();
  };
  $("#pictures").replaceChildren(...pending.map((item) => thumb(item, remove(item))));
}

function addPicture(item) {
  if (sent().length + pending.length >= config.max_images) {
    trouble(`One conversation can hold ${config.max_images} pictures. Start anew for more.`);
    return;
  }
  pending.push(item);
  showPending();
  say(`${item.name} added`);
}

// Bytes that a picture may have, so that as many as fit into one conversation fit into one request with its
// words: as base64 they are a third larger.
function share() {
  return Math.min(config.max_image_bytes, Math.floor((config.max_body - MIB) / config.max_images) * 0.74);
}

async function addFiles(files) {
  trouble("");
  for (const file of files) {
    try {
      addPicture(await picture(file, share()));
    } catch (problem) {
      trouble(problem.message);
    }
  }
}

async function openCamera() {
  trouble("");
  const box = $("#camera-box");
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    $("#camera-view").srcObject = stream;
    box.addEventListener("close", () => stream.getTracks().forEach((track) => track.stop()), { once: true });
    box.showModal();
  } catch {
    trouble("No camera can be used here. Add a picture instead.");
  }
}

async function takePhotograph() {
  try {
    addPicture(await photograph($("#camera-view"), share()));
  } catch {
    trouble("The camera has not shown a picture yet.");
  }
  $("#camera-box").close();
}

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
  if (!pending.length && !sent().length) return trouble("Add a picture first.");
  if ([...messages.map(written), words].join("").length > config.max_text) {
    return trouble(`One conversation can hold ${config.max_text} characters. Ask in fewer words, or start anew.`);
  }
  trouble("");
  const turn = fromTemplate("question-template");
  $(".thumbs", turn).replaceChildren(...pending.map((item) => thumb(item)));
  $(".words", turn).textContent = words;
  const parts = pending.map((item) => ({ type: "image_url", image_url: { url: item.url } }));
  messages.push({ role: "user", content: [...parts, { type: "text", text: words }] });
  pending = [];
  showPending();
  $("#question").value = "";
  $("#samples").hidden = true;
  $("#fresh").hidden = false;
  answer(fromTemplate("answer-template"));
}

// A button that hides takes the keyboard's place with it: it goes to Stop, then back to the question.
function busy(controller) {
  const held = document.activeElement;
  running = controller;
  $("#stop").hidden = !controller;
  $("#send").hidden = Boolean(controller);
  if (held?.closest("[hidden]")) $(controller ? "#stop" : "#question").focus({ preventScroll: true });
}

async function answer(turn) {
  const asked = [...messages];
  const controller = new AbortController();
  const words = $(".words", turn);
  words.textContent = "";
  $(".note", turn).hidden = $(".tools", turn).hidden = true;
  turn.setAttribute("aria-busy", "true");
  turn.scrollIntoView({ block: "nearest" });
  busy(controller);
  say("Answering");
  let problem = null;
  try {
    for await (const text of ask(config.model, asked, controller.signal)) {
      words.textContent += text;
    }
  } catch (caught) {
    problem = caught;
  }
  turn.removeAttribute("aria-busy");
  if (running === controller) busy(null);
  if (asked.at(-1) !== messages.at(-1)) return; // started anew meanwhile
  finish(turn, asked, words.textContent, problem);
}

function finish(turn, asked, text, problem) {
  const note = $(".note", turn);
  const stopped = problem?.name === "AbortError";
  if (!problem && !text) {
    note.textContent = "No answer.";
    note.hidden = false;
  }
  if (problem) {
    note.textContent = stopped ? "Stopped." : problem.message;
    note.hidden = false;
    if (problem instanceof ApiError && problem.status === 401) askForKey(WRONG_KEY);
  }
  const whole = !problem || (stopped && text);
  // A question that failed leaves the conversation, so that what was wrong with it does not spoil the next.
  // One that got no words stays, for its pictures.
  if (!whole) messages.pop();
  else if (text) messages.push({ role: "assistant", content: text });
  const again = $(".again", turn);
  again.hidden = whole || problem.code === "invalid_image";
  again.onclick = () => {
    if (running || messages.length !== asked.length - 1) return;
    messages.push(asked.at(-1));
    answer(turn);
  };
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
  say(note.hidden ? `Answer: ${text}` : note.textContent);
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
  pending = [];
  showPending();
  trouble("");
  $("#talk").replaceChildren();
  $("#samples").hidden = false;
  $("#fresh").hidden = true;
  $("#question").focus();
}

// --- opinions and attention --------------------------------------------------------------------------

function openOpinion(turn, asked, text, verdict) {
  const form = $(".opinion", turn);
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
    $(`.${verdict}`, turn).setAttribute("aria-pressed", "false");
    close();
  };
  form.onsubmit = async (event) => {
    event.preventDefault();
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

// Of several attempts, as when a second key is typed before the first is refused, the last one counts.
async function connect() {
  const attempt = ++attempts;
  try {
    const found = await settings();
    if (attempt !== attempts) return;
    config = { ...config, ...found };
    $("#model").textContent = config.model;
    $("#key-form").hidden = true;
  } catch (problem) {
    if (attempt !== attempts) return;
    if (problem.status === 401) askForKey(attempt > 1 ? WRONG_KEY : "");
    else trouble(problem.message);
  }
}

function showSamples() {
  const entries = SAMPLES.map(({ file, name, question }) => {
    const entry = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    const image = document.createElement("img");
    image.src = `/page/samples/${file}`;
    image.alt = "";
    const words = document.createElement("span");
    words.textContent = name;
    button.append(image, words);
    button.addEventListener("click", async () => {
      const blob = await (await fetch(image.src)).blob();
      await addFiles([new File([blob], name, { type: blob.type })]);
      $("#question").value = question;
      $("#question").focus();
    });
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
  $("#files").addEventListener("change", async (event) => {
    await addFiles([...event.target.files]);
    event.target.value = "";
  });
  $("#camera").hidden = !navigator.mediaDevices?.getUserMedia;
  $("#camera").addEventListener("click", openCamera);
  $("#camera-take").addEventListener("click", takePhotograph);
  $("#camera-cancel").addEventListener("click", () => $("#camera-box").close());
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
      addFiles(files);
    }
  });
  listenToDrops();
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
    addFiles([...event.dataTransfer.files]);
  });
}

listen();
showSamples();
connect();
