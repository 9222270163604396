// Heat maps of attention, made by heat_maps.py: a click on a small one shows that head large, in all models side by side, and
// pointing at a cell says what it is. Runs when Gradio loads the component; `element` holds whatever its value is.
let head = 0;
const pixels = new Map();

function show() {
  pixels.clear();
  for (const map of element.querySelectorAll(".attention")) {
    const heads = [...map.querySelectorAll(".head")];
    const chosen = heads[Math.min(head, heads.length - 1)];
    for (const one of heads) one.setAttribute("aria-pressed", one === chosen);
    map.querySelector(".heat img").src = chosen.querySelector("img").src;
    map.querySelector("h3 b").textContent = Number(chosen.dataset.head) + 1;
  }
}

function shareAt(image, query, key) {
  if (!pixels.has(image.src)) {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    pixels.set(image.src, context.getImageData(0, 0, canvas.width, canvas.height).data);
  }
  return pixels.get(image.src)[(query * image.naturalWidth + key) * 4 + 3] / 255;
}

element.addEventListener("click", (event) => {
  const chosen = event.target.closest(".head");
  if (!chosen) return;
  head = Number(chosen.dataset.head);
  show();
});

element.addEventListener("pointermove", (event) => {
  const image = event.target.closest(".heat img");
  if (!image?.complete) return;
  const box = image.getBoundingClientRect();
  const count = image.naturalWidth;
  const at = (offset, length) => Math.max(0, Math.min(count - 1, Math.floor((offset / length) * count)));
  const query = at(event.clientY - box.top, box.height);
  const key = at(event.clientX - box.left, box.width);
  const map = image.closest(".attention");
  for (const one of map.querySelectorAll(".heat .on")) one.classList.remove("on");
  const [from, to] = [map.querySelectorAll(".queries span")[query], map.querySelectorAll(".keys span")[key]];
  from.classList.add("on");
  to.classList.add("on");
  const share = key > query ? "sees no later token" : `${Math.round(shareAt(image, query, key) * 100)}%`;
  map.querySelector("output").textContent = `“${from.textContent}” (${query + 1}) looks at “${to.textContent}” (${key + 1}): ${share}`;
});

watch("value", show);
