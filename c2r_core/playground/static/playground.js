// Shows one point of the grid at a time; the address behind # says which. All text goes in as text, never as HTML.
"use strict";

(() => {
  const SQUARE = 18, TOP = 16;  // of the pictures, in their own units
  const SVG = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("data").textContent);
  const inputs = new Map();  // slider → its input and output

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function drawn(tag, properties, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
    if (text) made.append(text);
    return made;
  }

  // -- where we are -------------------------------------------------------------------------

  /** Each slider's place from the address; what it does not say, or says wrongly, is the start. */
  function places() {
    const given = new URLSearchParams(location.hash.slice(1));
    return Object.fromEntries(data.sliders.map((slider) => {
      const place = slider.values.findIndex((value) => String(value) === given.get(slider.name));
      return [slider.name, place < 0 ? slider.start : place];
    }));
  }

  function chosen() {
    return Object.fromEntries(data.sliders.map((slider) =>
      [slider.name, slider.values[Number(inputs.get(slider.name).input.value)]]));
  }

  // -- views --------------------------------------------------------------------------------

  function mean(values) {
    const known = values.filter((value) => value !== null);
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  }

  function summary(values) {
    const known = values.filter((value) => value !== null);
    if (!known.length) return ["–"];
    const ends = [Math.min(...known), Math.max(...known)].map((value) => value.toFixed(3));
    return [`${mean(known).toFixed(3)} `, element("span", { class: "soft" }, `${ends[0]} to ${ends[1]}`)];
  }

  function numbers(point, plain) {
    const head = ["", "Here", "Without the penalty"].map((title) => element("th", { scope: "col" }, title));
    const rows = data.metrics.map(({ field, title, better, what }) => element("tr", {},
      element("th", { scope: "row" }, title, " ",
        element("span", { class: "soft" }, better === "none" ? what : `${what}; ${better} is better`)),
      element("td", {}, ...summary(point[field])), element("td", {}, ...summary(plain[field]))));
    document.getElementById("numbers").replaceChildren(
      element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  }

  function colour(cosine) {
    const faded = (full) => Math.round(255 - (255 - full) * Math.min(1, Math.abs(cosine)));
    const [red, green, blue] = cosine > 0 ? [217, 95, 2] : [5, 80, 174];
    return `rgb(${faded(red)}, ${faded(green)}, ${faded(blue)})`;
  }

  function picture(title, point, features) {
    const rows = point.cosines.split("/").map((row) => row.split(" ").map(Number));
    const recovered = features.filter((_, i) => rows.some((row) => row[i] > 90)).length;
    const width = SQUARE * features.length, height = TOP + SQUARE * rows.length;
    const label = `${title}: ${rows.length} live latents; ${recovered} of ${features.length} features have a latent at a cosine above 0.9`;
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    features.forEach((name, i) => svg.append(drawn("text", { x: SQUARE * (i + 0.5), y: TOP - 4 }, name)));
    rows.forEach((row, latent) => row.forEach((hundredths, i) => {
      const square = drawn("rect", { x: SQUARE * i, y: TOP + SQUARE * latent, width: SQUARE, height: SQUARE,
        fill: colour(hundredths / 100), stroke: "#eaeef2" });
      square.append(drawn("title", {}, `row ${latent + 1}, ${features[i]}: ${(hundredths / 100).toFixed(2)}`));
      svg.append(square);
    }));
    return element("figure", {}, element("figcaption", {}, title), svg);
  }

  function render() {
    const at = chosen();
    for (const slider of data.sliders) {
      const { input, output } = inputs.get(slider.name);
      output.textContent = input.ariaValueText = String(at[slider.name]);
    }
    inputs.get("alpha").input.disabled = at.strength === 0;
    const world = data.worlds.find((one) => one.child === at.child && one.cosine === at.cosine);
    const plain = world.points.find((one) => one.strength === 0);
    const point = at.strength === 0 ? plain
      : world.points.find((one) => one.strength === at.strength && one.alpha === at.alpha);
    const title = at.strength === 0 ? "Here: no penalty"
      : `Here: strength ${at.strength}, α = ${at.alpha}, λ = ${point.weight.toPrecision(3)}`;
    numbers(point, plain);
    document.getElementById("pictures").replaceChildren(
      picture(title, point, world.features), picture("Without the penalty", plain, world.features));
  }

  // -- steering -----------------------------------------------------------------------------

  function steering({ prompt, factors, saes }) {
    const choice = (id, title, values) => {
      const made = element("select", { id }, ...values.map((value) => element("option", { value }, value)));
      return [element("label", { for: id }, `${title} `, made), made];
    };
    const [saeLabel, sae] = choice("steered-sae", "SAE", Object.keys(saes));
    const [latentLabel, latent] = choice("steered-latent", "Latent", []);
    const output = element("output", { for: "factor" });
    const input = element("input", { type: "range", id: "factor", min: 0, max: factors.length - 1, step: 1, value: 0 });
    document.getElementById("steer").append(saeLabel, latentLabel, element("div", { class: "slider" },
      element("label", { for: "factor" }, "Strength", output), input));

    function showText() {
      const one = saes[sae.value][latent.selectedIndex];
      output.textContent = input.ariaValueText = String(factors[input.value]);
      document.getElementById("written").replaceChildren(
        element("span", { class: "soft" }, prompt), one.texts[input.value]);
      document.getElementById("fires").replaceChildren(
        element("p", { class: "note" }, `Where latent ${one.latent} fires hardest (on ${(100 * one.density).toPrecision(2)} % of tokens):`),
        element("ul", {}, ...one.top.map((context) => element("li", {}, context))));
    }

    function listLatents() {
      latent.replaceChildren(...saes[sae.value].map((one) => element("option", {}, String(one.latent))));
      showText();
    }

    sae.addEventListener("input", listLatents);
    for (const control of [latent, input]) control.addEventListener("input", showText);
    listLatents();
  }

  // -- start --------------------------------------------------------------------------------

  for (const slider of data.sliders) {
    const input = element("input", { type: "range", id: slider.name, min: 0, max: slider.values.length - 1, step: 1 });
    const output = element("output", { for: slider.name });
    inputs.set(slider.name, { input, output });
    input.addEventListener("input", () => {
      history.replaceState(null, "", `#${new URLSearchParams(chosen())}`);
      render();
    });
    document.getElementById("sliders").append(element("div", { class: "slider" },
      element("label", { for: slider.name }, slider.title, output), input, element("p", {}, slider.what)));
  }

  function read() {
    for (const [name, place] of Object.entries(places())) inputs.get(name).input.value = String(place);
    render();
  }

  addEventListener("hashchange", read);
  document.getElementById("live").hidden = false;
  read();
  if (data.steering) steering(data.steering);
})();
