// A picture lit where the answer came from, dark elsewhere. The map: {rows, columns, values, row by row}.

const load = (url) =>
  new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = url;
  });

export async function overlay(url, { rows, columns, values }) {
  const image = await load(url);
  const scale = Math.min(1, 480 / Math.max(image.width, image.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", describe(rows, columns, values));
  const paint = canvas.getContext("2d");
  paint.drawImage(image, 0, 0, canvas.width, canvas.height);

  const map = document.createElement("canvas");
  map.width = columns;
  map.height = rows;
  const heat = map.getContext("2d");
  const pixels = heat.createImageData(columns, rows);
  const most = Math.max(...values, 1e-9);
  values.forEach((value, i) => pixels.data.set([0, 0, 0, Math.round(205 * (1 - value / most))], 4 * i));
  heat.putImageData(pixels, 0, 0);
  paint.imageSmoothingEnabled = true;
  paint.imageSmoothingQuality = "high";
  paint.drawImage(map, 0, 0, canvas.width, canvas.height);
  return canvas;
}

// The same for ears: where the strongest cell lies.
function describe(rows, columns, values) {
  const best = values.indexOf(Math.max(...values));
  const third = (at, size, names) => names[Math.min(2, Math.floor((3 * (at + 0.5)) / size))];
  const down = third(Math.floor(best / columns), rows, ["top", "middle", "bottom"]);
  const across = third(best % columns, columns, ["left", "centre", "right"]);
  return `The model looked mostly at the ${down} ${across} of this picture.`;
}
