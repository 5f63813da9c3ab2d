"use strict";

const LAYERS = ["photo", "surfaces", "boxes", "axes"];
const part = (id) => document.getElementById(id);
let photo = null; // the file that is shown
let latest = 0; // the number of the question asked last: answers to others are late
let link = null;

function say(text, wrong = false) {
  part("status").textContent = text;
  part("status").classList.toggle("wrong", wrong);
}

async function ask() {
  if (!photo || !part("controls").reportValidity()) return;
  const mine = ++latest;
  const asked = new URLSearchParams({
    fov: part("fov").value,
    threshold: part("threshold").value,
    layers: "1",
  });
  say("Looking …");
  part("stage").classList.add("busy");
  const start = performance.now();
  let answer;
  try {
    const response = await fetch(`poses?${asked}`, {
      method: "POST",
      body: photo,
      headers: { "Content-Type": photo.type.startsWith("image/") ? photo.type : "application/octet-stream" },
    });
    answer = await response.json();
  } catch {
    answer = { error: "The server cannot be reached, or broke off. Is it running?" };
  }
  if (mine !== latest) return;
  part("stage").classList.remove("busy");
  if (answer.error) {
    say(answer.error, true);
    return;
  }
  show(answer);
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  const count = answer.poses.length;
  say(`${count} ${count === 1 ? "object" : "objects"} found in ${seconds} s`);
}

function show({ layers, ...poses }) {
  for (const name of LAYERS) part(name).src = layers[name];
  part("picture").hidden = false;
  part("stage").classList.add("filled");

  const rows = poses.poses.map((pose) => {
    const row = document.createElement("tr");
    const millimetres = [0, 1, 2].map((i) => (1000 * pose.T_CO[i][3]).toFixed(1));
    const cells = [pose.name, pose.score.toFixed(2), ...millimetres, `${Math.round(100 * pose.visibility)} %`];
    for (const text of cells) row.insertCell().textContent = text;
    return row;
  });
  part("found").tBodies[0].replaceChildren(...rows);
  part("found").hidden = rows.length === 0;

  if (link) URL.revokeObjectURL(link);
  link = URL.createObjectURL(new Blob([JSON.stringify(poses, null, 1)], { type: "application/json" }));
  const stem = (photo.name || "photo").replace(/\.[^.]*$/, "");
  Object.assign(part("download"), { href: link, download: `${stem}_poses.json`, hidden: false });
}

function take(file) {
  if (!file) return;
  photo = file;
  ask();
}

function listen() {
  part("file").addEventListener("change", () => take(part("file").files[0]));
  part("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const name of ["fov", "threshold"]) part(name).addEventListener("change", ask);
  for (const box of document.querySelectorAll("[data-layer]")) {
    box.addEventListener("change", () => (part(box.dataset.layer).hidden = !box.checked));
  }
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault(); // a photo dropped beside the place is taken too, not opened
      part("stage").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  }
  part("demo").addEventListener("click", async () => {
    const picture = await (await fetch("demo.png")).blob();
    take(new File([picture], "demo.png", { type: "image/png" }));
  });
}

async function start() {
  listen();
  const about = await (await fetch("about")).json();
  part("known").textContent = `It looks for: ${about.objects.join(", ")}.`;
  part("fov").value = about.fov;
  part("route").textContent =
    `curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg '${location.origin}/poses?fov=${about.fov}'`;
  document.body.dataset.ready = "yes";
}

start().catch(() => say("The server cannot be reached. Is it running?", true));
