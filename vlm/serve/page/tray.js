// The tray: pictures that wait for the next question, and those that are still being read.

import { config } from "/page/api.js";
import { $, say, trouble } from "/page/dom.js";
import { photograph, picture } from "/page/pictures.js";

const MIB = 1 << 20;
const WAIT = "A picture is still being read. Ask again in a moment.";
let items = [];
let reading = 0;
let era = 0; // ends when the page starts anew: what was being read then belongs to nothing any more
let used = () => 0;

// How many pictures the conversation holds already.
export const countWith = (count) => (used = count);
export const waiting = () => items.length;
export const holds = (name) => items.some((item) => item.name === name);

export function thumb(item, remove) {
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

function show() {
  const remove = (item) => () => {
    items = items.filter((other) => other !== item);
    show();
    $("#choose").focus();
  };
  $("#pictures").replaceChildren(...items.map((item) => thumb(item, remove(item))));
}

// Whether there was room for it.
export function put(item) {
  if (used() + items.length >= config.max_images) {
    trouble(`One conversation can hold ${config.max_images} pictures. Start anew for more.`);
    return false;
  }
  items.push(item);
  show();
  say(`${item.name} added`);
  return true;
}

// Whether a question must wait, lest it goes without a picture that was chosen for it.
export function unready() {
  if (reading) trouble(WAIT);
  return reading > 0;
}

export function take() {
  const taken = items;
  items = [];
  show();
  return taken;
}

export function empty() {
  era += 1;
  reading = 0;
  take();
}

// What a picture may have, so that as many as fit into one conversation fit into one request with its words:
// as base64 they are a third larger.
function bounds() {
  const share = Math.floor((config.max_body - MIB) / config.max_images) * 0.74;
  return { bytes: Math.min(config.max_image_bytes, share), pixels: config.max_pixels };
}

// One after another; what goes wrong with one is told and does not stop the rest. Returns how many were
// added.
async function read(works) {
  const begun = era;
  trouble("");
  reading += 1;
  let added = 0;
  for (const work of works) {
    try {
      const item = await work();
      if (begun !== era) return 0;
      added += put(item);
    } catch (problem) {
      if (begun !== era) return 0;
      trouble(problem.message);
    }
  }
  reading -= 1;
  if (!reading && $("#trouble").textContent === WAIT) trouble("");
  return added;
}

export const addFiles = (files) => read(files.map((file) => () => picture(file, bounds())));

export const addSample = (file, name) =>
  read([
    async () => {
      const response = await fetch(`/page/samples/${file}`).catch(() => null);
      if (!response?.ok) throw new Error("That sample cannot be loaded now. Try it again, or add a picture.");
      const blob = await response.blob();
      return picture(new File([blob], name, { type: blob.type }), bounds());
    },
  ]);

// --- the camera ------------------------------------------------------------------------------------

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
  const take = () =>
    photograph($("#camera-view"), bounds()).catch(() => {
      throw new Error("The camera has not shown a picture yet.");
    });
  await read([take]);
  $("#camera-box").close();
}

export function listenToCamera() {
  $("#camera").hidden = !navigator.mediaDevices?.getUserMedia;
  $("#camera").addEventListener("click", openCamera);
  $("#camera-take").addEventListener("click", takePhotograph);
  $("#camera-cancel").addEventListener("click", () => $("#camera-box").close());
}
