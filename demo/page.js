// Runs once for each HTML element of the page that people click or send files with; `element` and `trigger` are gradio's.

// Files: read here and sent as data URLs, so that nothing is stored. The server checks all of it again.
const dataURL = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

element.addEventListener("change", async (event) => {
  const chosen = [...event.target.files];
  const total = chosen.reduce((sum, file) => sum + file.size, 0);
  const fits = total <= Number(event.target.dataset.limit);
  const files = [];
  for (const file of chosen) {
    const size = fits ? file.size : total;
    files.push({ name: file.name, size, data: fits ? await dataURL(file).catch(() => null) : null });
  }
  event.target.value = ""; // the same file may be chosen again
  trigger("upload", { files });
});

// Places: a click or a drag over the grid names them in order.
let stroke = null;

const extend = (event) => {
  const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-patch]");
  if (!cell || !element.contains(cell)) return;
  const patch = Number(cell.dataset.patch);
  if (stroke.includes(patch)) return;
  stroke.push(patch);
  cell.classList.add("marked");
};

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest("[data-patch]")) return;
  event.preventDefault();
  stroke = [];
  extend(event);
});
element.addEventListener("pointermove", (event) => { if (stroke) extend(event); });
window.addEventListener("pointerup", () => {
  if (stroke?.length) trigger("select", { patches: stroke });
  stroke = null;
});
