// One page for all views; the address behind # says which. All text goes in as text, never as HTML.
"use strict";

const C2R = (() => {
  const ROWS = 100;
  const pieces = new Map();  // "sae-piece" → its latents
  const waiting = new Map();  // "sae-piece" → what to do when they are there
  let data = null;
  let order = { by: "number", down: false };
  const page = document.getElementById("page");
  const choice = document.getElementById("sae");
  const query = document.getElementById("query");

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "class") made.className = value;
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  const show = (...children) => page.replaceChildren(...children.filter((child) => child !== null));
  const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
  const percent = (share) => `${(100 * share).toPrecision(2)} %`;
  const address = (sae, latent) => `#/latent/${sae}/${latent}`;

  // -- data ---------------------------------------------------------------------------------

  function withLatent(sae, latent, use) {
    const number = Math.floor(latent / data.piece);
    const key = `${sae}-${number}`;
    const found = () => use(pieces.get(key)[latent % data.piece]);
    if (pieces.has(key)) return found();
    waiting.set(key, found);
    const file = `data/${sae}-${String(number).padStart(5, "0")}.js`;
    const failed = () => show(element("p", {}, `${file} could not be loaded.`));
    document.body.append(element("script", { src: file, onerror: failed }));
  }

  function piece(sae, number, latents) {
    const key = `${sae}-${number}`;
    pieces.set(key, latents);
    if (waiting.has(key)) waiting.get(key)();
    waiting.delete(key);
  }

  // -- views --------------------------------------------------------------------------------

  function listOf(sae, first, wanted) {
    const latents = data.saes[sae].latents;
    let numbers = [...latents.density.keys()];
    if (wanted) {
      const text = wanted.toLowerCase();
      numbers = numbers.filter((i) => latents.token[i].toLowerCase().includes(text));
    }
    const key = { number: (i) => i, density: (i) => latents.density[i], max: (i) => latents.max[i],
      token: (i) => latents.token[i].trim().toLowerCase() }[order.by];
    const sign = order.down ? -1 : 1;
    numbers.sort((a, b) => (key(a) < key(b) ? -sign : key(a) > key(b) ? sign : a - b));
    const head = (by, title, css) => element("th", { class: css, scope: "col",
      "aria-sort": order.by !== by ? "none" : order.down ? "descending" : "ascending" },
      element("button", { onclick: () => {
        order = { by, down: order.by === by ? !order.down : by !== "number" && by !== "token" };
        render();
      } }, title));
    const rows = numbers.slice(first, first + ROWS).map((i) => element("tr", {},
      element("td", { class: "number" }, element("a", { href: address(sae, i) }, String(i))),
      element("td", {}, latents.density[i] ? visible(latents.token[i]) : "fires on none of these tokens"),
      element("td", { class: "number" }, latents.density[i] ? percent(latents.density[i]) : "–"),
      element("td", { class: "number hide-small" }, String(latents.max[i]))));
    const at = (start, title) => (start < 0 || start >= numbers.length ? null
      : element("a", { href: `#/list/${sae}/${start}/${encodeURIComponent(wanted)}` }, title));
    const live = latents.density.filter((share) => share > 0).length;
    show(
      element("h1", {}, wanted ? `Latents whose strongest token holds “${wanted}”` : `All latents of ${data.saes[sae].name}`),
      element("p", { class: "note" }, `${live} of ${latents.density.length} fire on the text shown. `
        + "Click a heading to sort."),
      numbers.length ? element("table", {}, element("thead", {}, element("tr", {},
        head("number", "Latent", "number"), head("token", "Strongest token", ""),
        head("density", "Fires on", "number"), head("max", "Largest activation", "number hide-small"))),
        element("tbody", {}, ...rows)) : element("p", {}, "None."),
      element("div", { class: "pager" }, at(first - ROWS, "← before"),
        element("span", { class: "soft" }, `${Math.min(first + 1, numbers.length)}–${Math.min(first + ROWS, numbers.length)} of ${numbers.length}`),
        at(first + ROWS, "next →")));
  }

  function contextOf(one, most) {
    const tokens = one.tokens.map((token, i) => {
      const strength = most ? Math.min(1, one.acts[i] / most) : 0;
      const css = i === one.at ? "token at" : "token";
      const made = element("span", { class: css, title: `${visible(token)}: ${one.acts[i]}` }, visible(token));
      if (strength > 0) made.style.backgroundColor = `rgba(var(--fire), ${(0.12 + 0.5 * strength).toFixed(2)})`;
      return made;
    });
    return element("div", { class: "context" }, element("span", { class: "value" }, String(one.acts[one.at])), ...tokens);
  }

  function contexts(title, note, list, most) {
    return element("section", {}, element("h2", {}, title), element("p", { class: "note" }, note),
      ...(list.length ? list.map((one) => contextOf(one, most)) : [element("p", {}, "None.")]));
  }

  function tokenTable(title, pairs) {
    return element("section", {}, element("h2", {}, title), element("table", {}, element("tbody", {},
      ...pairs.map(([token, value]) => element("tr", {}, element("td", {}, visible(token)),
        element("td", { class: "number" }, String(value)))))));
  }

  function latentPage(sae, number) {
    const all = data.saes[sae].latents;
    withLatent(sae, number, (latent) => {
      const most = all.max[number];
      const tallest = Math.log1p(Math.max(...latent.histogram, 1));
      const bars = latent.histogram.map((count) => {
        const bar = element("div", { title: String(count) });
        bar.style.height = `${(100 * Math.log1p(count)) / tallest}%`;
        return bar;
      });
      const carries = data.concepts.filter((concept) => concept.saes[data.saes[sae].name].modal === number);
      const step = (to, title) => (to < 0 || to >= all.density.length ? null : element("a", { href: address(sae, to) }, title));
      show(
        element("h1", {}, `Latent ${number} of ${data.saes[sae].name}`),
        element("div", { class: "pager" }, step(number - 1, "← before (k)"), step(number + 1, "next (j) →")),
        element("p", {}, all.density[number]
          ? `Fires on ${percent(all.density[number])} of ${data.tokens} tokens; mean ${latent.mean}, largest ${most}.`
          : `Fires on none of ${data.tokens} tokens.`),
        carries.length ? element("p", {}, "Most frequent carrier of the first letter ",
          ...carries.map((concept) => element("a", { href: `#/concepts/${concept.name}` }, `${concept.name} `))) : null,
        contexts("Where it fires hardest", "One token of each context is underlined; the colour is the activation.", latent.top, most),
        contexts("From the middle of its range", "Drawn from the half of its firings that is neither strong nor weak.", latent.middle, most),
        contexts("Where it nearly fires", "Silent, although the activation points along its direction most.", latent.near_misses, most),
        element("h2", {}, "Activations"),
        element("div", { class: "bars", role: "img", "aria-label": "Histogram of activations above 0, counts on a log scale" }, ...bars),
        element("div", { class: "axis" }, element("span", {}, "0"), element("span", {}, "counts on a log scale"), element("span", {}, String(most))),
        element("div", { class: "columns" },
          tokenTable("Promotes", latent.promotes), tokenTable("Suppresses", latent.suppresses),
          element("section", {}, element("h2", {}, "Nearest decoder rows"), element("table", {}, element("tbody", {},
            ...latent.neighbours.map(([other, cosine]) => element("tr", {},
              element("td", {}, element("a", { href: address(sae, other) }, String(other))),
              element("td", {}, visible(all.token[other])), element("td", { class: "number" }, String(cosine)))))))));
    });
  }

  const isException = (own, n) => own.carriers[n] < 0 || own.carriers[n] !== own.modal;

  // [key, its words] for every key that a word's number has.
  function grouped(words, key) {
    const found = new Map();
    words.forEach((word, n) => found.set(key(n), [...(found.get(key(n)) || []), word.trim()]));
    return [...found];
  }

  // The latent of the most words first, the words of no latent last.
  const byCarrier = (words, own) => grouped(words, (n) => own.carriers[n])
    .sort(([a, ofA], [b, ofB]) => (a < 0) - (b < 0) || ofB.length - ofA.length || a - b);

  // By the SAEs in which a word is an exception: those of none first, those of all last.
  function byExceptions(words, saes) {
    const where = (n) => saes.flatMap((own, i) => (isException(own, n) ? [i] : [])).join();
    return grouped(words, where)
      .sort(([a], [b]) => a.length - b.length || (a < b ? -1 : 1))
      .map(([numbers, found]) => [numbers && numbers.split(",").map((i) => saes[i].name).join(" and "), found]);
  }

  const chips = (words, css, to) => element("ul", { class: "words" }, ...words.map((word) => element("li",
    { class: css }, to ? element("a", { href: to }, word) : element("span", {}, word))));

  function conceptsPage(chosen) {
    const concept = data.concepts.find((one) => one.name === chosen) || data.concepts[0];
    if (!concept) {
      show(element("h1", {}, "First letters"), element("p", {}, "No letter can be measured with this model and text."));
      return;
    }
    const links = data.concepts.map((one) => element("a", { href: `#/concepts/${one.name}`,
      ...(one === concept ? { "aria-current": "page" } : {}) }, `${one.name} `));
    const saes = data.saes.map((sae) => ({ name: sae.name, ...concept.saes[sae.name] }));
    const leftOut = [..."ABCDEFGHIJKLMNOPQRSTUVWXYZ"].filter((letter) => !data.concepts.some((one) => one.name === letter));
    const columns = saes.map((own, i) => element("section", {}, element("h2", {}, own.name),
      element("p", {}, `Exceptions: ${own.carriers.filter((_, n) => isException(own, n)).length} of ${concept.words.length} words; `
        + `AC ${own.consistency}`),
      ...byCarrier(concept.words, own).flatMap(([carrier, words]) => {
        const to = carrier < 0 ? null : address(i, carrier);
        const css = carrier < 0 ? "exception none" : carrier === own.modal ? "" : "exception";
        const title = to ? element("a", { href: to }, `latent ${carrier}`) : "no latent";
        return [element("h3", {}, title, `: ${words.length}`), chips(words, css, to)];
      })));
    show(
      element("h1", {}, `Words that start with ${concept.name}`),
      element("p", {}, "Letters (j and k turn the page): ", ...links),
      element("p", { class: "note" }, "A word's carrier is the latent that writes most of the letter's direction. Red words are "
        + "exceptions: another latent than the most frequent carrier writes most, or, dashed, no latent carries the letter. "
        + "AC is the chance that two words have one carrier."
        + (leftOut.length ? ` Not here: ${leftOut.join(", ")}; the model itself does not tell these letters well, or they have too few words.` : "")),
      element("div", { class: "columns" }, ...columns),
      saes.length < 2 ? null : element("section", {}, element("h2", {}, "Where each word is an exception"),
        ...byExceptions(concept.words, saes).flatMap(([where, words]) => [
          element("h3", {}, `${where || "nowhere"}: ${words.length}`), chips(words, where ? "exception" : "", null)])));
  }

  // -- where we are -------------------------------------------------------------------------

  function render() {
    const [view, ...rest] = location.hash.replace(/^#\//, "").split("/");
    const sae = Math.min(Number(rest[0]) || 0, data.saes.length - 1);
    if (view === "latent" || view === "list") choice.value = String(sae);
    if (view === "latent") {
      const last = data.saes[sae].latents.density.length - 1;
      latentPage(sae, Math.max(0, Math.min(Number(rest[1]) || 0, last)));
    } else if (view === "concepts") conceptsPage(rest[0]);
    else listOf(view === "list" ? sae : Number(choice.value), Number(rest[1]) || 0, decodeURIComponent(rest[2] || ""));
    document.title = (page.querySelector("h1") || page).textContent;
  }

  function index(given) {
    data = given;
    data.saes.forEach((sae, i) => choice.append(element("option", { value: String(i) }, sae.name)));
    document.getElementById("about").append(
      `${data.model} at ${data.hook_name}; ${data.tokens} tokens of ${data.text}.`);
    choice.addEventListener("change", () => {
      const parts = location.hash.split("/");
      if (parts[1] === "latent") location.hash = address(choice.value, parts[3]);
      else location.hash = `#/list/${choice.value}/0/`;
    });
    document.getElementById("go").addEventListener("submit", (event) => {
      event.preventDefault();
      const wanted = query.value.trim();
      const many = data.saes[Number(choice.value)].latents.density.length;
      if (/^\d+$/.test(wanted) && Number(wanted) < many) location.hash = address(choice.value, wanted);
      else location.hash = `#/list/${choice.value}/0/${encodeURIComponent(wanted)}`;
    });
    addEventListener("hashchange", () => { render(); page.focus(); scrollTo(0, 0); });
    addEventListener("keydown", (event) => {
      const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
      if (event.key === "/" && !typing) { event.preventDefault(); query.focus(); }
      const [, view, first, number] = location.hash.split("/");
      const move = { j: 1, k: -1 }[event.key];
      if (typing || !move || event.ctrlKey || event.metaKey) return;
      if (view === "latent") {
        const to = Number(number) + move;
        if (to >= 0 && to < data.saes[first].latents.density.length) location.hash = address(first, to);
      } else if (view === "concepts") {
        const at = Math.max(0, data.concepts.findIndex((one) => one.name === first));
        const to = data.concepts[at + move];
        if (to) location.hash = `#/concepts/${to.name}`;
      }
    });
    render();
  }

  return { index, piece };
})();
