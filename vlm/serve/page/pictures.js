// Files from anywhere (chosen, dropped, pasted, camera, samples) -> data URLs that the server can read.

const KINDS = new Set(["image/jpeg", "image/png", "image/webp", "image/gif"]);
const SIDE = 2048;

const read = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

async function draw(bitmap, side) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const paint = canvas.getContext("2d");
  paint.fillStyle = "#fff";
  paint.fillRect(0, 0, canvas.width, canvas.height);
  paint.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

// Smaller and smaller until it fits: noise of 2048 pixels a side is still several MB.
async function redraw(bitmap, most) {
  let side = SIDE;
  let blob = await draw(bitmap, side);
  while (blob.size > most && side > 64) {
    side /= 2;
    blob = await draw(bitmap, side);
  }
  return blob;
}

// Files of the four kinds go as they are where they have at most so many bytes and pixels; others are drawn
// anew as a JPEG of at most 2048 pixels a side.
export async function picture(file, { bytes, pixels }) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "That"} is not a picture that can be read. Use JPEG, PNG, WebP or GIF.`);
  }
  const fits = KINDS.has(file.type) && file.size <= bytes && bitmap.width * bitmap.height <= pixels;
  const blob = fits ? file : await redraw(bitmap, bytes);
  bitmap.close();
  return { name: file.name || "picture", url: await read(blob) };
}

export async function photograph(video, { bytes }) {
  const bitmap = await createImageBitmap(video);
  return { name: "photograph", url: await read(await redraw(bitmap, bytes)) };
}
