// The canvas of the tab Recognise: strokes by mouse, touch or pen, and files by drop, paste or choice. What it holds is
// the component's value, and the event "input" says that it changed:
//   [[[x, y], ...], ...]  its strokes as JSON: whole numbers from 0 to 1000, whatever the canvas's size on the screen
//   data:...;base64,...   a file, of which Python gets at most one byte more than it takes, and then refuses it
// `element`, `props` and `trigger` are Gradio's.
const UNITS = 1000, NEAREST = 4, INTERVAL_MS = 300;
const canvas = element.querySelector("canvas"), context = canvas.getContext("2d");
const pens = element.querySelector(".pens"), chooser = element.querySelector("input[type=file]");
const mostBytes = Number(canvas.dataset.mostBytes);
let strokes = [], pointer = null, timer = null, sent = props.value;

function penWidth() {
  return Number(pens.querySelector("input:checked").value);
}

function paint() {
  context.clearRect(0, 0, UNITS, UNITS);
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = "#111";
  for (const { points, width } of strokes) {
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(...points[0]);
    points.forEach((point) => context.lineTo(...point)); // a stroke of one point is a dot
    context.stroke();
  }
}

function send(value) {
  clearTimeout(timer);
  timer = null;
  if (value === sent) return;
  sent = props.value = value;
  trigger("input");
}

function sendStrokes() {
  send(JSON.stringify(strokes.map((stroke) => stroke.points)));
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  const share = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return share.map((part) => Math.round(UNITS * Math.min(Math.max(part, 0), 1)));
}

canvas.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button !== 0) return; // one finger draws; others are the palm
  pointer = event.pointerId;
  canvas.setPointerCapture(pointer);
  strokes.push({ points: [place(event)], width: penWidth() });
  paint();
});

canvas.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  const points = strokes[strokes.length - 1].points;
  const moves = event.getCoalescedEvents?.() ?? [];
  for (const move of moves.length ? moves : [event]) {
    const [x, y] = place(move), [lastX, lastY] = points[points.length - 1];
    if (Math.hypot(x - lastX, y - lastY) >= NEAREST) points.push([x, y]);
  }
  paint();
  timer ??= setTimeout(sendStrokes, INTERVAL_MS);
});

function endStroke(event) {
  if (event.pointerId !== pointer) return;
  pointer = null;
  sendStrokes();
}
canvas.addEventListener("pointerup", endStroke);
canvas.addEventListener("pointercancel", endStroke);

function undo() {
  if (pointer !== null) return;
  strokes.pop();
  paint();
  sendStrokes();
}

function clear() {
  if (pointer !== null) return;
  strokes = [];
  paint();
  sendStrokes();
}
element.querySelector(".undo").addEventListener("click", undo);
element.querySelector(".clear").addEventListener("click", clear);
canvas.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
});

function take(file) {
  const reader = new FileReader();
  reader.onload = () => {
    strokes = [];
    paint();
    send(reader.result);
  };
  reader.readAsDataURL(file.slice(0, mostBytes + 1));
}

element.querySelector(".choose").addEventListener("click", () => chooser.click());
chooser.addEventListener("change", () => {
  if (chooser.files.length) take(chooser.files[0]);
  chooser.value = ""; // so that the same file can be chosen again
});
canvas.addEventListener("dragover", (event) => event.preventDefault());
canvas.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", function paste(event) {
  if (!canvas.isConnected) return document.removeEventListener("paste", paste);
  if (canvas.offsetParent === null || event.target.closest?.("input, textarea")) return;
  const file = event.clipboardData.files[0], text = event.clipboardData.getData("text");
  if (file) take(file);
  else if (text) take(new Blob([text]));
});

if (sent?.startsWith("[")) { // the tab was away, as it is for a model that knows no sketches
  strokes = JSON.parse(sent).map((points) => ({ points, width: penWidth() }));
  paint();
}
