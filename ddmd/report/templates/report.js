"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const cases = JSON.parse(byId("data").textContent);
  const rows = Array.from(document.querySelectorAll("#cases tbody tr"));
  const body = document.querySelector("#cases tbody");

  // ---------------------------------------------------------------- the table
  const valueOf = (row, column) => {
    const text = row.cells[column].dataset.value;
    return text === "" || text === "None" ? null : Number(text);
  };
  const sortBy = (column, descending) => {
    rows.sort((a, b) => {
      const [x, y] = [valueOf(a, column), valueOf(b, column)];
      if (x === null || y === null) return (x === null) - (y === null); // what is not known comes last
      return (descending ? y - x : x - y) || valueOf(a, 0) - valueOf(b, 0);
    });
    body.append(...rows);
  };
  for (const button of document.querySelectorAll("#cases thead button")) {
    button.addEventListener("click", () => {
      const heading = button.closest("th");
      const column = Number(button.dataset.column);
      const now = heading.getAttribute("aria-sort");
      const descending = now ? now === "ascending" : column > 0; // figures: the largest first
      for (const other of document.querySelectorAll("#cases thead th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(column, descending);
    });
  }
  const filter = () => {
    const words = byId("find").value.trim().toLocaleLowerCase();
    let count = 0;
    for (const row of rows) {
      const { name, flags, lesions } = cases[row.dataset.id];
      row.hidden =
        !(name + " " + flags.join(" ")).toLocaleLowerCase().includes(words) ||
        (byId("only-lesions").checked && !lesions.length) ||
        (byId("only-flags").checked && !flags.length);
      count += !row.hidden;
    }
    byId("shown").textContent = `${count} of ${rows.length} cases`;
    byId("nothing").hidden = count > 0 || !rows.length;
  };
  for (const id of ["find", "only-lesions", "only-flags"]) byId(id).addEventListener("input", filter);
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && !String(window.getSelection())) open(row.dataset.id);
  });

  // ---------------------------------------------------------------- files: decoded when a case is opened
  const bytesOf = (base64) => {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  };
  const inflated = async (base64) => {
    const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  };
  const runScript = (url) =>
    new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = url;
      script.onload = () => resolve(script.remove());
      script.onerror = () => reject(new Error(script.remove() || "their file is not there; keep the folder report_volumes beside this page"));
      document.head.append(script);
    });
  const received = new Map();
  window.ddmdReport = { receive: (id, volumes) => received.set(id, volumes) };

  const CROSSHAIR = 0.6; // mm
  let viewer = null; // of NiiVue, made once
  const drawsInSoftware = () => {
    const gl = document.createElement("canvas").getContext("webgl2");
    if (!gl) throw new Error("this browser has no WebGL 2");
    const names = gl.getExtension("WEBGL_debug_renderer_info");
    const name = names ? gl.getParameter(names.UNMASKED_RENDERER_WEBGL) : "";
    gl.getExtension("WEBGL_lose_context")?.loseContext();
    return /swiftshader|llvmpipe|softpipe|software|basic render/i.test(name);
  };
  const makeViewer = async () => {
    const slow = drawsInSoftware(); // the planes are quick enough, the rendering beside them is not
    const url = URL.createObjectURL(new Blob([await inflated(byId("niivue").textContent)], { type: "text/javascript" }));
    await runScript(url);
    URL.revokeObjectURL(url);
    byId("niivue").remove();
    const made = new window.niivue.Niivue({
      logLevel: "error", dragAndDropEnabled: false, loadingText: "", showLegend: false, showAllOrientationMarkers: true,
      backColor: [0, 0, 0, 1], crosshairColor: [0.43, 0.7, 0.95, 0.7], fontColor: [0.75, 0.78, 0.82, 1],
      multiplanarShowRender: window.niivue.SHOW_RENDER[slow ? "NEVER" : "ALWAYS"], show3Dcrosshair: true, tileMargin: 10,
      crosshairWidth: CROSSHAIR, crosshairWidthUnit: "mm", crosshairGap: 6,
    });
    made.onLocationChange = showLocation;
    await made.attachToCanvas(byId("canvas"), true);
    return made;
  };

  // ---------------------------------------------------------------- layers
  const ORDER = ["image", "uncertainty", "probability", "mask", "labels"]; // from below
  const LAYERS = {
    image: { title: "Image" },
    mask: { title: "Lesion mask", opacity: 0.9, shown: true },
    labels: { title: "Lesions by number", opacity: 0.7 },
    probability: { title: "Probability", opacity: 0.7, colours: "viridis", from: 0.1 },
    uncertainty: { title: "Uncertainty", opacity: 0.8, colours: "inferno", from: 0.1 },
  };
  const settings = Object.fromEntries(
    Object.entries(LAYERS).map(([key, { opacity = 1, shown = false }]) => [key, { opacity, shown }]),
  );
  const labelColours = (count) => {
    const colours = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    for (let n = 1; n <= count; n++) {
      const hue = (n * 137.508) % 360; // the golden angle: neighbours differ
      const channel = (k) => {
        const at = (k + hue / 30) % 12;
        return Math.round(255 * (0.6 - 0.4 * Math.max(-1, Math.min(at - 3, 9 - at, 1))));
      };
      colours.R.push(channel(0)); colours.G.push(channel(8)); colours.B.push(channel(4));
      colours.A.push(255); colours.I.push(n); colours.labels.push(String(n));
    }
    return colours;
  };
  const MASK_COLOURS = { R: [0, 255], G: [0, 60], B: [0, 64], A: [0, 255], I: [0, 1], labels: ["", "lesion"] };

  // voxels of a label map with a neighbour of six outside their label
  const outlined = (labels, [nx, ny, nz]) => {
    const edges = new labels.constructor(labels.length);
    for (let z = 0, i = 0; z < nz; z++)
      for (let y = 0; y < ny; y++)
        for (let x = 0; x < nx; x++, i++) {
          const label = labels[i];
          if (!label) continue;
          const inside = x > 0 && x + 1 < nx && y > 0 && y + 1 < ny && z > 0 && z + 1 < nz;
          if (!inside || labels[i - 1] !== label || labels[i + 1] !== label || labels[i - nx] !== label ||
            labels[i + nx] !== label || labels[i - nx * ny] !== label || labels[i + nx * ny] !== label) edges[i] = label;
        }
    return edges;
  };

  let current = null; // { id, layers: key -> NVImage, base: key, filled, edges: key -> voxels of mask and labels }
  const load = async (key, base64, isBase) => {
    const image = await window.niivue.NVImage.loadFromUrl({
      url: await inflated(base64), name: `${key}.nii`, colormap: isBase ? "gray" : LAYERS[key].colours || "gray",
    });
    if (key === "mask" && !isBase) image.setColormapLabel(MASK_COLOURS);
    if (key === "labels" && !isBase) image.setColormapLabel(labelColours(Math.round(image.cal_max)));
    if (LAYERS[key].from !== undefined && !isBase) image.cal_min = image.cal_max * LAYERS[key].from;
    return image;
  };
  const draw = () => {
    const { layers, base, filled, edges } = current;
    for (const key of Object.keys(filled)) {
      if (byId("outline").checked) edges[key] ??= outlined(filled[key], layers[key].hdr.dims.slice(1, 4));
      layers[key].img = byId("outline").checked ? edges[key] : filled[key];
    }
    const shown = ORDER.filter((key) => layers[key] && (key === base || settings[key].shown));
    shown.sort((a, b) => (b === base) - (a === base));
    for (const key of shown) layers[key].opacity = key === base ? 1 : settings[key].opacity;
    const flat = shown.filter((key) => filled[key]).map((key) => settings[key].opacity);
    viewer.opts.atlasOutline = byId("outline").checked ? Math.max(0, ...flat) : 0; // of voxels on a border
    viewer.volumes = shown.map((key) => layers[key]);
    viewer.back = viewer.volumes[0];
    viewer.overlays = viewer.volumes.slice(1);
    viewer.updateGLVolume();
  };
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const range = (label, value, change) => {
    const input = element("input", { type: "range", min: 0, max: 100, value: Math.round(value * 100) });
    input.setAttribute("aria-label", label);
    let waiting = 0;
    input.addEventListener("input", () => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(() => change(input.value / 100));
    });
    return input;
  };
  const scale = (image) => {
    const colours = viewer.colormap(image.colormap);
    const canvas = element("canvas", { width: 256, height: 1 });
    const pixels = canvas.getContext("2d").createImageData(256, 1);
    for (let i = 0; i < 256; i++) pixels.data.set([...colours.slice(4 * i, 4 * i + 3), 255], 4 * i);
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    canvas.setAttribute("aria-hidden", "true");
    const figure = (x) => String(Number(x.toPrecision(2)));
    return element("div", { className: "scale" }, figure(image.cal_min), canvas, figure(image.cal_max));
  };
  const showLayers = () => {
    const { layers, base } = current;
    const panel = byId("layers");
    panel.replaceChildren();
    for (const key of [base, ...ORDER.filter((k) => k !== base).reverse()]) {
      const image = layers[key];
      if (!image) continue;
      const { title } = LAYERS[key];
      const line = element("div", { className: "layer" });
      if (key === base) {
        const [low, high] = [image.cal_min, image.cal_max];
        line.append(element("span", {}, title), range("Contrast of the image", 0.5, (share) => {
          image.cal_min = low;
          image.cal_max = low + (high - low) * Math.max(0.05, 1.5 - share);
          viewer.updateGLVolume();
        }));
      } else {
        const box = element("input", { type: "checkbox", checked: settings[key].shown });
        box.dataset.layer = key;
        box.addEventListener("change", () => { settings[key].shown = box.checked; draw(); });
        line.append(
          element("label", {}, box, title),
          range(`Opacity of ${title}`, settings[key].opacity, (share) => {
            settings[key].opacity = share;
            if (settings[key].shown) draw();
          }),
        );
        if (LAYERS[key].colours) line.append(scale(image));
      }
      panel.append(line);
    }
  };

  // ---------------------------------------------------------------- the panel of a case
  const figure = (value, places) => (value === null || value === undefined ? "–" : value.toFixed(places));
  const showCase = (id) => {
    const { name, lesions, facts, flags, notes, overlay } = cases[id];
    byId("viewer-name").textContent = name;
    document.title = `${name} – ${document.querySelector("h1").textContent}`;
    byId("flags").replaceChildren(...flags.flatMap((flag) => [element("span", { className: "flag" }, flag), " "]));
    byId("facts").replaceChildren(
      ...Object.entries(facts).flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, value)]),
    );
    byId("notes").replaceChildren(...notes.map((note) => element("li", {}, note)));
    byId("picture").hidden = !overlay;
    if (overlay) byId("picture").href = overlay;
    const panel = byId("lesions");
    panel.replaceChildren(element("p", { className: "quiet" }, "none found"));
    if (!lesions.length) return;
    const table = element("table", {}, element("thead", {}, element("tr", {},
      ...["Lesion", "ml", "Peak p"].map((text, i) =>
        Object.assign(element("th", { className: i ? "figure" : "" }, text), { scope: "col" })))));
    const list = element("tbody");
    for (const { number, centre, ml, peak } of lesions) {
      const button = element("button", { type: "button", disabled: !centre }, `${number}`);
      if (centre) {
        button.setAttribute("aria-label", `Go to lesion ${number}`);
        button.title = `${centre.map((mm) => mm.toFixed(0)).join(", ")} mm (RAS)`;
        button.addEventListener("click", () => goTo(centre));
      }
      list.append(element("tr", {}, element("td", {}, button),
        element("td", { className: "figure" }, figure(ml, 2)), element("td", { className: "figure" }, figure(peak, 2))));
    }
    table.append(list);
    panel.replaceChildren(table);
  };
  const goTo = (mm) => {
    if (!current) return;
    viewer.scene.crosshairPos = viewer.mm2frac(mm);
    viewer.createOnLocationChange();
    viewer.drawScene();
  };
  function showLocation(location) {
    if (!current) return;
    const mm = Array.from(location.mm).slice(0, 3);
    const parts = [`${mm.map((v) => v.toFixed(1)).join(", ")} mm (RAS)`];
    const names = { image: "image", probability: "probability", uncertainty: "variance", labels: "lesion" };
    const places = { image: 0, probability: 2, uncertainty: 4, labels: 0 };
    for (const key of Object.keys(names)) {
      const image = current.layers[key];
      if (!image) continue;
      const drawn = image.img;
      image.img = current.filled[key] || drawn;
      const value = image.getValue(...image.mm2vox(mm));
      image.img = drawn;
      if (key !== "labels" || value > 0) parts.push(`${names[key]} ${figure(value, places[key])}`);
    }
    byId("location").textContent = parts.join("   ·   ");
  }

  // ---------------------------------------------------------------- opening and closing
  const dialog = byId("viewer");
  const say = (text) => { byId("message").textContent = text; };
  const visible = () => rows.filter((row) => !row.hidden).map((row) => row.dataset.id);
  let wanted = null;
  let opener = null;
  let work = Promise.resolve();
  const open = (id) => {
    if (!cases[id]) return;
    wanted = id;
    if (!dialog.open) {
      opener = document.querySelector(`tr[data-id="${CSS.escape(id)}"] .open`);
      dialog.showModal();
    }
    dialog.removeAttribute("data-shown");
    showCase(id);
    const order = visible();
    const at = order.indexOf(id);
    byId("viewer-position").textContent = at < 0 ? "" : `${at + 1} of ${order.length}`;
    byId("previous").disabled = at <= 0;
    byId("next").disabled = at < 0 || at + 1 >= order.length;
    history.replaceState(null, "", `#${encodeURIComponent(id)}`);
    say("Loading …");
    byId("layers").replaceChildren();
    byId("location").textContent = "";
    work = work.then(() => show(id)).catch((error) => {
      console.warn(error);
      say(`The volumes cannot be shown: ${error.message}.`);
    });
  };
  const show = async (id) => {
    if (wanted !== id) return; // another case was asked for meanwhile
    current = null;
    if (viewer) { viewer.volumes = []; viewer.back = null; viewer.overlays = []; }
    const { script, lesions } = cases[id];
    if (!script) {
      viewer?.drawScene();
      say("There are no volumes of this case.");
      return;
    }
    viewer = viewer || (await makeViewer());
    await runScript(script);
    const volumes = received.get(id);
    received.delete(id);
    if (!volumes) throw new Error("their file is of another case");
    const base = ["image", "probability", "uncertainty", "mask", "labels"].find((key) => volumes[key]);
    const layers = {};
    for (const key of ORDER) if (volumes[key]) layers[key] = await load(key, volumes[key], key === base);
    if (wanted !== id) return;
    const flat = ["mask", "labels"].filter((key) => layers[key] && key !== base);
    current = { id, layers, base, filled: Object.fromEntries(flat.map((key) => [key, layers[key].img])), edges: {} };
    draw();
    showLayers();
    say("");
    viewer.setSliceType(view());
    const first = lesions.find((lesion) => lesion.centre);
    viewer.scene.pan2Dxyzmm = [0, 0, 0, 1];
    if (first) goTo(first.centre);
    else { viewer.scene.crosshairPos = [0.5, 0.5, 0.5]; goTo(viewer.frac2mm([0.5, 0.5, 0.5]).slice(0, 3)); }
    dialog.dataset.shown = id;
  };
  const step = (by) => {
    const order = visible();
    const id = order[order.indexOf(wanted) + by];
    if (id) open(id);
  };
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => { // comes some time after the dialog has closed
    if (dialog.open) return; // another case was opened meanwhile
    wanted = current = null;
    if (viewer) { viewer.volumes = []; viewer.back = null; viewer.overlays = []; } // gives the memory back
    document.title = `${document.querySelector("h1").textContent} – lesion report`;
    history.replaceState(null, "", "#");
    if (document.activeElement === document.body) opener?.focus(); // what has the focus by now keeps it
  });

  // ---------------------------------------------------------------- views and keys
  const views = Array.from(document.querySelectorAll(".views button"));
  const view = () => Number(views.find((button) => button.getAttribute("aria-checked") === "true").dataset.view);
  const setView = (button) => {
    for (const other of views) {
      other.setAttribute("aria-checked", String(other === button));
      other.tabIndex = other === button ? 0 : -1;
    }
    if (current) viewer.setSliceType(view());
  };
  views.forEach((button, i) => {
    button.tabIndex = i ? -1 : 0;
    button.addEventListener("click", () => setView(button));
    button.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = views[(i + by + views.length) % views.length];
      setView(next);
      next.focus();
      event.preventDefault();
    });
  });
  const toggle = (id, change) => byId(id).addEventListener("change", () => { if (viewer) change(byId(id).checked); });
  toggle("outline", () => { if (current) draw(); });
  toggle("radiological", (on) => viewer.setRadiologicalConvention(on));
  toggle("crosshair", (on) => viewer.setCrosshairWidth(on ? CROSSHAIR : 0));
  const MOVES = {
    ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
    PageUp: [0, 0, 1], PageDown: [0, 0, -1],
  };
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onCanvas = event.target === byId("canvas");
    const key = event.key.toLowerCase();
    if (onCanvas && MOVES[event.key] && current) {
      const [x, y, z] = MOVES[event.key];
      viewer.moveCrosshairInVox(byId("radiological").checked ? -x : x, y, z);
    }
    else if (key === "n") step(1);
    else if (key === "p") step(-1);
    else if (key >= "1" && key <= "5") setView(views[Number(key) - 1]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }, { capture: true });

  filter();
  const asked = decodeURIComponent(location.hash.slice(1));
  if (asked) open(asked);
})();
