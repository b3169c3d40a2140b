// What every part of the page uses to find its elements and to speak: aloud, or where troubles are shown.

export const $ = (selector, within = document) => within.querySelector(selector);
export const say = (text) => ($("#status").textContent = text);
export const trouble = (text) => ($("#trouble").textContent = text);
