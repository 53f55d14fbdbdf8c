// The page's figures, as SVG: the kernel, its spectrum, and the Vendi score along a run.

/** As in .72, −.05, 1.00. */
export const number = (x, digits) => x.toFixed(digits).replace("-", "−").replace(/^(−?)0/, "$1");
const svg = (width, height, label, content) => (
  `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${label}">${content}</svg>`);

/** Cosines of all pairs, the darker the nearer to 1; `low` is white. */
export function gramFigure(kernel, low) {
  const side = 120 / kernel.length, few = kernel.length <= 4;
  const digits = low > 0.9 ? 3 : 2, cells = kernel.flatMap((row, i) => row.map((cosine, j) => {
    const share = Math.min(1, Math.max(0, (cosine - low) / (1 - low))), at = [(j + 0.5) * side, (i + 0.5) * side + 4];
    const style = `fill: var(--${share > 0.5 ? "paper" : "ink"}); font-size: ${side > 40 ? 12 : 9.5}px`;
    const label = few ? `<text x="${at[0]}" y="${at[1]}" text-anchor="middle" style="${style}">${
      number(cosine, digits)}</text>` : "";
    return `<rect x="${j * side}" y="${i * side}" width="${side - 1}" height="${side - 1}" fill="var(--row)"
      fill-opacity="${0.06 + 0.94 * share}"/>${label}`;
  }));
  const said = `Cosines of the samples: ${kernel.map((row) => row.map((x) => number(x, digits)).join(" ")).join("; ")}`;
  return svg(120, 120, said, cells.join(""));
}

/** Eigenvalues on a logarithmic scale, the largest first. */
export function spectrumFigure(values) {
  const lowest = -5, y = (x) => 108 * Math.min(1, Math.max(0, Math.log10(Math.max(x, 1e-9)) / lowest));
  const sorted = [...values].sort((a, b) => b - a), width = 92 / sorted.length;
  const lines = [["1", y(1)], [".01", y(1e-2)], ["10⁻⁴", y(1e-4)]].map(([name, at]) => (
    `<line class="axis" x1="26" x2="120" y1="${at}" y2="${at}"/>
    <text x="22" y="${at + 4}" text-anchor="end">${name}</text>`));
  const bars = sorted.map((x, i) => `<rect x="${28 + i * width}" y="${y(x)}" width="${Math.max(2, width - 3)}"
    height="${Math.max(0, 108 - y(x))}" fill="var(--row)"/>`);
  return svg(120, 120, `Eigenvalues: ${sorted.map((x) => x.toPrecision(2)).join(", ")}`,
    `${lines.join("")}${bars.join("")}<line class="axis" x1="26" x2="120" y1="108" y2="108"/>`);
}

/** The Vendi score of each row at every point of a run, of `steps` parts with a noise level each; a mark at `point`. */
export function curveFigure(rows, levels, points, point, width) {
  const height = 220, [left, right, top, bottom] = [34, 8, 12, 34];
  const scores = Object.values(rows).flat().filter((x) => x !== undefined), most = Math.max(1.05, ...scores);
  const x = (i) => left + (width - left - right) * (i + 0.5) / points;
  const y = (score) => top + (height - top - bottom) * (1 - (score - 1) / (most - 1)), perStep = points / levels.length;
  const unit = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2].find((u) => (most - 1) / u <= 5), ticks = [];
  for (let score = 1; score <= most + 1e-9; score += unit) {
    ticks.push(`<line class="axis" x1="${left}" x2="${width - right}" y1="${y(score)}" y2="${y(score)}"/>
      <text x="${left - 6}" y="${y(score) + 4}" text-anchor="end">${score.toFixed(unit < 0.1 ? 2 : 1)}</text>`);
  }
  const steps = levels.map((sigma, step) => {
    const from = x(step * perStep - 0.5), middle = x((step + 0.5) * perStep - 0.5);
    return `${step ? `<line class="axis" x1="${from}" x2="${from}" y1="${top}" y2="${height - bottom}"/>` : ""}
      <text x="${middle}" y="${height - bottom + 16}" text-anchor="middle">step ${step + 1}</text>
      <text x="${middle}" y="${height - bottom + 29}" text-anchor="middle">σ = ${sigma.toFixed(2)}</text>`;
  });
  const lines = Object.entries(rows).map(([row, values]) => {
    const dots = values.map((score, i) => score && `${x(i)},${y(score)}`).filter(Boolean);
    const last = values.findLastIndex((score) => score !== undefined);
    return `<polyline points="${dots.join(" ")}" fill="none" stroke="var(--${row})" stroke-width="2"
      ${row === "control" ? 'stroke-dasharray="5 3"' : ""}/>
      ${last === point ? `<circle cx="${x(last)}" cy="${y(values[last])}" r="3.5" fill="var(--${row})"/>` : ""}`;
  });
  const legend = Object.keys(rows).map((row, i) => `<text x="${width - right - 70 * (Object.keys(rows).length - i - 1)}"
    y="${top + 2}" text-anchor="end" style="fill: var(--${row}); font-weight: 600">${row}</text>`);
  const mark = `<line x1="${x(point)}" x2="${x(point)}" y1="${top}" y2="${height - bottom}" stroke="var(--soft)"/>`;
  const content = [ticks, steps, mark, lines, legend].flat().join("");
  return svg(width, height, "The Vendi score after each block of each step", content);
}
