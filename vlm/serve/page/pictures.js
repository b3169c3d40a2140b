// Files from anywhere (chosen, dropped, pasted, camera, samples) -> data URLs that the server can read.

const KINDS = new Set(["image/jpeg", "image/png", "image/webp", "image/gif"]);
const AS_IT_IS = 4 << 20;
const SIDE = 2048;

const read = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

async function redraw(bitmap) {
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const paint = canvas.getContext("2d");
  paint.fillStyle = "#fff";
  paint.fillRect(0, 0, canvas.width, canvas.height);
  paint.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

// Small files of the four kinds go as they are; others are drawn anew as a JPEG of at most 2048 pixels a side.
export async function picture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "That"} is not a picture that can be read. Use JPEG, PNG, WebP or GIF.`);
  }
  const blob = KINDS.has(file.type) && file.size <= AS_IT_IS ? file : await redraw(bitmap);
  bitmap.close();
  return { name: file.name || "picture", url: await read(blob) };
}

export async function photograph(video) {
  const bitmap = await createImageBitmap(video);
  return { name: "photograph", url: await read(await redraw(bitmap)) };
}
