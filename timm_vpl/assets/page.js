'use strict';
// The curves of a report's page. Drag over epochs to zoom, double-click for all; values show under the pointer.
// Names are set as text, never as markup.
(() => {
  const SVG = 'http://www.w3.org/2000/svg', HEIGHT = 320, LEFT = 66, RIGHT = 12, BOTTOM = 40;

  function add(parent, tag, attributes = {}, text = null) {
    const svg = tag === 'svg' || parent.namespaceURI === SVG;
    const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    return parent.appendChild(element);
  }

  // Round numbers from low to high, about so many.
  function ticks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
    return found;
  }

  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
    return found.filter(value => value >= low && value <= high);
  }

  function chart(panel, root) {
    const show = value => panel.format.endsWith('f') ? value.toFixed(2)
      : value && Math.abs(value) < 1e-3 ? value.toExponential(2) : value.toPrecision(3);
    const color = line => line.color === '#000000' ? 'currentColor' : line.color;
    const stroke = line => ({stroke: color(line), 'stroke-width': line.thin ? 1 : 2.2, 'stroke-dasharray': line.dash});
    const epochs = [...new Set(panel.lines.flatMap(line => line.x))].sort((one, two) => one - two);
    const all = [-0.5, Math.max(...epochs, ...panel.spans.map(span => span[1])) + 0.5], hidden = new Set();
    let view = null, scaleX = null, pressed = null;

    const figure = add(root, 'figure'), head = add(figure, 'figcaption');
    add(head, 'b', {}, panel.title);
    const epochShown = add(head, 'span'), whole = add(head, 'button', {hidden: ''}, 'All epochs');
    const svg = add(figure, 'svg', {role: 'img', 'aria-label': panel.title, height: HEIGHT});
    const legend = add(figure, 'ul', {class: 'legend'});
    const values = panel.lines.map(line => {
      const button = add(add(legend, 'li'), 'button', {'aria-pressed': 'true'});
      add(add(button, 'svg', {width: 28, height: 10}), 'line', {x1: 0, x2: 28, y1: 5, y2: 5, ...stroke(line)});
      const value = add(button, 'span', {class: 'value'});
      add(button, 'span', {}, line.runs > 1 ? `${line.label} (${line.runs} runs)` : line.label);
      button.onclick = () => {
        hidden.delete(line) || hidden.add(line);
        button.setAttribute('aria-pressed', String(!hidden.has(line)));
        draw();
      };
      return value;
    });

    function tell(epoch) {  // null: the last value of each line
      epochShown.textContent = epoch === null ? 'last values' : `epoch ${epoch}`;
      panel.lines.forEach((line, number) => {
        const known = line.x.map((x, i) => i).filter(i => line.y[i] !== null);
        const i = epoch === null ? known[known.length - 1] : line.x.indexOf(epoch);
        const band = line.low.length && i >= 0 ? ` [${show(line.low[i])}, ${show(line.high[i])}]` : '';
        values[number].textContent = i >= 0 && line.y[i] !== null ? show(line.y[i]) + band : '–';
      });
    }

    function draw() {
      const width = Math.max(figure.clientWidth, 260), top = panel.spans.length ? 38 : 10;
      const [from, to] = view || all, shown = panel.lines.filter(line => !hidden.has(line));
      const ys = (shown.length ? shown : panel.lines).flatMap(line => [line.y, line.low, line.high].flatMap(
        list => list.filter((y, i) => y !== null && line.x[i] >= from && line.x[i] <= to)));
      let low = Math.min(...ys), high = Math.max(...ys);
      if (!ys.length) [low, high] = panel.bounds;
      if (!view) low = Math.max(low, panel.bounds[0]);
      const bend = panel.log ? Math.log : y => y, margin = 0.04 * (bend(high) - bend(low)) || Math.abs(low) * 0.04 || 1;
      const ceiling = panel.unit.includes('%') ? 100.5 : Infinity;
      const base = bend(low) - margin, span = Math.min(bend(high) + margin, bend(ceiling)) - base;
      const x = epoch => LEFT + (epoch - from) / (to - from) * (width - LEFT - RIGHT);
      const y = value => HEIGHT - BOTTOM - (bend(value) - base) / span * (HEIGHT - BOTTOM - top);
      scaleX = pixel => from + (pixel - LEFT) / (width - LEFT - RIGHT) * (to - from);
      whole.hidden = !view;
      svg.replaceChildren();
      svg.setAttribute('width', width);
      const clip = `clip-${[...root.children].indexOf(figure)}`;
      const area = {x: LEFT, y: top, width: width - LEFT - RIGHT, height: HEIGHT - BOTTOM - top};
      add(add(svg, 'clipPath', {id: clip}), 'rect', area);
      panel.spans.forEach(([first, last, name], i) => {
        const left = Math.max(x(first - 0.5), LEFT), right = Math.min(x(last + 0.5), width - RIGHT);
        if (right <= left) return;
        add(svg, 'rect', {...area, x: left, width: right - left, class: i % 2 ? 'shade odd' : 'shade'});
        const room = Math.floor((right - left) / 6);
        name.split(': ').reverse().forEach((part, row) => {
          const text = part.length <= room ? part : room > 6 ? `${part.slice(0, room - 1)}…` : '';
          add(add(svg, 'text', {x: (left + right) / 2, y: top - 7 - 14 * row, class: 'small', 'text-anchor': 'middle'},
            text), 'title', {}, name);
        });
      });
      const lowest = panel.log ? Math.exp(base) : base, highest = panel.log ? Math.exp(base + span) : base + span;
      let marks = panel.log ? logTicks(lowest, highest) : [];
      if (marks.length < 3) marks = ticks(lowest, highest, 5);
      for (const value of marks) {
        add(svg, 'line', {x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: 'grid'});
        add(svg, 'text', {x: LEFT - 6, y: y(value) + 4, 'text-anchor': 'end'}, Number(value.toPrecision(6)));
      }
      for (const epoch of ticks(from, to, width / 70).filter(Number.isInteger))
        add(svg, 'text', {x: x(epoch), y: HEIGHT - BOTTOM + 17, 'text-anchor': 'middle'}, epoch);
      add(svg, 'text', {x: (LEFT + width) / 2, y: HEIGHT - 5, 'text-anchor': 'middle'}, 'epoch');
      add(svg, 'text', {
        transform: `translate(13 ${(HEIGHT - BOTTOM + top) / 2}) rotate(-90)`, 'text-anchor': 'middle'}, panel.unit);
      const inside = add(svg, 'g', {'clip-path': `url(#${clip})`});
      for (const line of shown) {
        const point = (list, i) => `${x(line.x[i]).toFixed(1)} ${y(list[i]).toFixed(1)}`;
        if (line.low.length) {
          const edge = [...line.x.keys()];
          add(inside, 'path', {class: 'band', fill: color(line), d: `M${edge.map(i => point(line.high, i)).join('L')}L${
            edge.reverse().map(i => point(line.low, i)).join('L')}Z`});
        }
        let path = '';
        line.y.forEach((value, i) => {
          if (value !== null) path += (i && line.y[i - 1] !== null ? 'L' : 'M') + point(line.y, i);
        });
        add(inside, 'path', {class: 'line', d: path, ...stroke(line)});
        const seen = line.x.filter((epoch, i) => line.y[i] !== null && epoch >= from && epoch <= to);
        if (seen.length <= 25)
          for (const epoch of seen)
            add(inside, 'circle', {
              cx: x(epoch), cy: y(line.y[line.x.indexOf(epoch)]), r: line.thin ? 1.5 : 2.5, fill: color(line)});
      }
      const cursor = add(svg, 'line', {y1: top, y2: HEIGHT - BOTTOM, class: 'cursor', visibility: 'hidden'});
      const choice = add(svg, 'rect', {...area, class: 'choice', visibility: 'hidden'});
      svg.onpointermove = event => {
        const pixel = event.clientX - svg.getBoundingClientRect().left, at = scaleX(pixel);
        const epoch = epochs.reduce((best, each) => Math.abs(each - at) < Math.abs(best - at) ? each : best);
        cursor.setAttribute('x1', x(epoch));
        cursor.setAttribute('x2', x(epoch));
        cursor.setAttribute('visibility', epoch >= from && epoch <= to ? 'visible' : 'hidden');
        tell(epoch);
        if (pressed !== null) {
          choice.setAttribute('x', Math.min(pixel, pressed));
          choice.setAttribute('width', Math.abs(pixel - pressed));
          choice.setAttribute('visibility', 'visible');
        }
      };
    }

    svg.onpointerdown = event => {
      pressed = event.clientX - svg.getBoundingClientRect().left;
      svg.setPointerCapture(event.pointerId);
    };
    svg.onpointerup = event => {
      const pixel = event.clientX - svg.getBoundingClientRect().left, ends = [pressed, pixel].map(scaleX);
      const chosen = epochs.filter(epoch => epoch >= Math.min(...ends) && epoch <= Math.max(...ends));
      if (pressed !== null && Math.abs(pixel - pressed) > 8 && chosen.length > 1)
        view = [chosen[0] - 0.5, chosen[chosen.length - 1] + 0.5];
      pressed = null;
      draw();
    };
    svg.onpointercancel = () => { pressed = null; draw(); };
    svg.onpointerleave = () => { if (pressed === null) { tell(null); draw(); } };
    svg.ondblclick = whole.onclick = () => { view = null; draw(); };
    tell(null);
    new ResizeObserver(draw).observe(root);
    draw();
  }

  const root = document.getElementById('curves');
  for (const panel of JSON.parse(document.getElementById('data').textContent)) chart(panel, root);
})();
