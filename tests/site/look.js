// What a reader would see wrong on this page: evaluated in the page by check_pages.py, which expects an empty list.
(backgrounds) => {
  const canvas = document.createElementNS("http://www.w3.org/1999/xhtml", "canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((one, i) => one * a + below[i] * (1 - a));
  const luminance = (color) => {
    const [r, g, b] = color.map((one) => (one / 255 <= 0.04045 ? one / 255 / 12.92 : ((one / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = new Set();
  const judge = (words, [r, g, b, a], below, opacity = 1) => {
    const ratio = contrast(over([r, g, b, a * opacity], below), below);
    if (ratio < 4.5) found.add(`contrast ${ratio.toFixed(2)}: ${words.trim().slice(0, 40)}, ${[r, g, b]} on ${below.map(Math.round)}`);
  };

  if (document.documentElement.localName === "svg") {
    const shapes = [...document.querySelectorAll("rect, path, circle, ellipse, polygon")];
    const labels = [...document.querySelectorAll("text"), ...document.querySelectorAll("g[id^=text_]")];
    for (const label of labels) {
      const box = label.getBoundingClientRect();
      const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
      const before = shapes.filter((one) => one.compareDocumentPosition(label) & Node.DOCUMENT_POSITION_FOLLOWING && !label.contains(one));
      const under = before.filter((one) => {
        const { x: left, y: top, right, bottom } = one.getBoundingClientRect();
        return one.localName === "rect" && getComputedStyle(one).fill !== "none" && left <= x && x <= right && top <= y && y <= bottom;
      });
      const inner = label.localName === "g" ? label.querySelector("g") ?? label : label;
      const ends = document.documentElement.getBoundingClientRect();
      if (box.left < ends.left - 1 || box.right > ends.right + 1 || box.top < ends.top - 1 || box.bottom > ends.bottom + 1) {
        found.add(`cut label: ${label.textContent.trim()}`);
      }
      for (const background of backgrounds) {
        const paint = (below, one) => {
          const [r, g, b, a] = rgba(getComputedStyle(one).fill);
          return over([r, g, b, a * getComputedStyle(one).fillOpacity * getComputedStyle(one).opacity], below);
        };
        judge(label.textContent, rgba(getComputedStyle(inner).fill), under.reduce(paint, rgba(background).slice(0, 3)));
      }
    }
    if (!labels.length) found.add("a picture without labels");
    return [...found];
  }

  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) {
    found.add(`the page is ${wide} pixels wide on ${innerWidth}`);
  }
  const scrolls = (one) => ["auto", "scroll"].includes(getComputedStyle(one).overflowX);
  const clips = (one) => ["hidden", "clip"].includes(getComputedStyle(one).overflowX);
  const main = document.querySelector("article") ?? document.querySelector("main") ?? document.body;
  for (const cell of main.querySelectorAll("th, td, pre, img")) {
    const { left, right } = cell.getBoundingClientRect();
    let holder = cell;
    while (holder && !scrolls(holder) && !clips(holder)) holder = holder.parentElement;
    const reached = holder && scrolls(holder) && holder !== document.body;
    if (!reached && (left < -1 || right > innerWidth + 1)) found.add(`cut ${cell.localName}: ${cell.textContent.slice(0, 40)}`);
  }
  for (const table of main.querySelectorAll("table")) {
    let holder = table;
    while (holder && !scrolls(holder)) holder = holder.parentElement;
    if (!holder || holder === document.body || holder.scrollWidth <= holder.clientWidth) continue;
    const first = [...table.querySelectorAll(":is(th, td):first-child")];
    const most = Math.max(...first.map((one) => one.getBoundingClientRect().width));
    if (most > holder.clientWidth / 2) found.add(`a first column takes ${most} of ${holder.clientWidth} pixels`);
    holder.scrollLeft = holder.scrollWidth;
    const gone = holder.getBoundingClientRect().left - first[0].getBoundingClientRect().left;
    if (gone > 1) found.add(`a first column leaves by ${gone} pixels`);
    holder.scrollLeft = 0;
  }
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const chain = (element) => (element ? [...chain(element.parentElement), element] : []);
  const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark");
  const paint = (below, one) => over(rgba(getComputedStyle(one).backgroundColor), below);
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    const element = text.parentElement;
    const seen = element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && element.getClientRects().length;
    if (!text.data.trim() || !seen || element.closest("script, style, .headerlink")) continue;
    const all = chain(element);
    const below = all.reduce(paint, dark ? [0, 0, 0] : [255, 255, 255]);
    const opacity = all.reduce((sum, one) => sum * getComputedStyle(one).opacity, 1);
    judge(text.data, rgba(getComputedStyle(element).color), below, opacity);
  }
  return [...found];
}
