'use strict';
const STAGES = ['queue', 'preprocess', 'vision', 'projector', 'prefill', 'decode'];
const SAMPLES = 60;
const $ = (id) => document.getElementById(id);
const robots = new Map();
let token = sessionStorage.getItem('token');
let model = null;
let listening = null;

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** Changes a text only if it is another, so that screen readers do not read it again. */
function say(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

function sayAll(list, texts) {
  const said = [...list.children].map((item) => item.textContent);
  if (said.join('\n') !== texts.join('\n')) list.replaceChildren(...texts.map((text) => element('li', { textContent: text })));
}

/** With four digits, or one of large numbers; never minus zero. */
const number = (x) => x.toFixed(Math.abs(x) >= 100 ? 1 : 4).replace(/^-(0\.0+)$/, '$1');
const percent = (p) => (p >= 0.995 && p < 1 ? '> 99' : (100 * p).toFixed(0)) + '\u00a0%';
const duration = (ms) => ms.toFixed(ms < 10 ? 2 : ms < 100 ? 1 : 0);

function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  return fetch(path, { ...options, headers, cache: 'no-store', credentials: 'omit' });
}

function setState(state, text) {
  $('state').dataset.state = state;
  say($('state'), text);
}

/** Shows what there is to see, or the form that asks for the token. */
function show(isIn) {
  for (const id of ['server', 'robots', 'try']) $(id).hidden = !isIn;
  $('sign-in').hidden = isIn;
  $('forget').hidden = !isIn || !token;
}

/** The error of an answer, as a sentence. */
async function errorOf(response) {
  const error = await response.json().catch(() => ({}));
  return [error.message ?? `The server answered ${response.status}.`, error.hint].filter(Boolean).join('; ');
}

/** Listens until the stream ends; gives the seconds to wait before the next try, or null if there is none. */
async function listen(signal) {
  const response = await ask('/page/events', { signal });
  if (response.status === 401 || (token && response.status === 403)) {
    const why = response.status === 401 ? 'This is not the server’s token.' : `${await errorOf(response)}.`;
    if (token) say($('token-error'), why);
    token = null;
    sessionStorage.removeItem('token');
    show(false);
    setState('wait', 'waiting for the token');
    $('token').focus();
    return null;
  }
  if (!response.ok) {
    setState('wait', await errorOf(response));
    return Number(response.headers.get('retry-after')) || 5;
  }
  show(true);
  if (token) sessionStorage.setItem('token', token);
  setState('live', 'live');
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return 1;
    text += value;
    const events = text.split('\n\n');
    text = events.pop();
    for (const event of events) {
      const [name, data] = event.split('\n').map((line) => line.slice(line.indexOf(': ') + 2));
      (name === 'robot' ? onRobot : onServer)(JSON.parse(data));
    }
  }
}

async function start() {
  stop();
  const control = new AbortController();
  listening = control;
  while (listening === control) {
    let wait = 2;
    try {
      wait = await listen(control.signal);
    } catch {
      // The server is gone, or the page is hidden.
    }
    if (wait === null || listening !== control) return;
    if ($('state').dataset.state === 'live') setState('wait', 'the connection was lost; trying again');
    await new Promise((done) => setTimeout(done, 1000 * wait));
  }
}

function stop() {
  listening?.abort();
  listening = null;
}

function onServer(server) {
  for (const name of ['waiting', 'superseded', 'dropped', 'connections', 'restarts']) say($(name), String(server[name]));
  say($('model'), server.model ?? '');
  sayAll($('server-warnings'), [...(server.why ? [`No requests are taken: ${server.why}.`] : []), ...losses(server)]);
  for (const [name, robot] of robots) {
    if (!server.robots.includes(name)) {
      robot.card.remove();
      robots.delete(name);
    }
  }
  $('nobody').hidden = robots.size > 0;
  for (const robot of robots.values()) age(robot);
  if (server.model && !model) describe();
}

const counts = [];

/** What was lost in the last ten seconds, as a person would say it. */
function losses({ superseded, dropped }) {
  const now = performance.now();
  counts.push({ now, superseded, dropped });
  while (counts[0].now < now - 10000) counts.shift();
  const said = [];
  const late = dropped - counts[0].dropped;
  const newer = superseded - counts[0].superseded;
  if (late > 0) said.push(`${late} observations were dropped in the last ten seconds: their deadline had passed, or their robot left.`);
  if (newer > 0) said.push(`${newer} observations were superseded in the last ten seconds: a robot looks more often than the model can answer.`);
  return said;
}

function age({ card, at, hz }) {
  const seconds = Math.max(0, Date.now() / 1000 - at);
  const ago = seconds < 3 ? 'now' : seconds < 120 ? `${seconds.toFixed(0)} s ago` : `${(seconds / 60).toFixed(0)} min ago`;
  say(card.querySelector('.when'), hz && seconds < 3 ? `${hz.toFixed(1)} steps a second` : `last step ${ago}`);
  card.classList.toggle('old', seconds >= 10);
}

function onRobot(view) {
  let robot = robots.get(view.robot);
  if (!robot) {
    const card = $('card').content.firstElementChild.cloneNode(true);
    card.querySelector('h3').textContent = view.robot ?? 'A robot without a name';
    robot = { card, samples: [], pictures: [] };
    robots.set(view.robot, robot);
    $('cards').append(card);
    $('nobody').hidden = true;
  }
  if (robot.n && view.n > robot.n && view.at > robot.at) {
    const hz = (view.n - robot.n) / (view.at - robot.at);
    robot.hz = robot.hz ? 0.8 * robot.hz + 0.2 * hz : hz;
  }
  Object.assign(robot, { n: view.n, at: view.at });
  const { card } = robot;
  const part = (name) => card.querySelector(name);
  drawPictures(robot, part('.pictures'), view.pictures);
  say(part('.instruction'), `“${view.instruction}”`);
  sayAll(part('.warnings'), view.warnings);
  drawMotion(part('.motion'), view.motion);
  if (view.timing_ms) {
    robot.samples.push(view.timing_ms);
    if (robot.samples.length > SAMPLES) robot.samples.shift();
  }
  part('.times').hidden = robot.samples.length === 0;
  drawTimes(card, robot.samples);
  age(robot);
}

function drawPictures(robot, place, pictures) {
  if (robot.pictures.length !== pictures.length) {
    robot.pictures = pictures.map(() => element('img'));
    place.replaceChildren(...pictures.map((_, i) => element('figure', {}, robot.pictures[i], element('figcaption'))));
  }
  pictures.forEach(({ name, data, width, height }, i) => {
    const image = robot.pictures[i];
    Object.assign(image, { src: data, width, height, alt: `What the model sees of the ${name}` });
    say(image.nextSibling, `${name}, ${width} × ${height}`);
  });
}

function drawMotion(table, motion) {
  table.hidden = !motion;
  if (!motion) return;
  const first = motion.n_action > 1 ? `The first of ${motion.n_action} actions, ` : 'Motion, ';
  say(table.caption, `${first}in units of ${motion.unnorm_key}`);
  const hasLikely = motion.dimensions.some(({ alternatives }) => alternatives.length > 0);
  table.querySelector('thead .likely').hidden = !hasLikely;
  const body = table.tBodies[0];
  while (body.rows.length > motion.dimensions.length) body.lastElementChild.remove();
  motion.dimensions.forEach((dimension, i) => {
    const row = body.rows[i] ?? body.appendChild(dimensionRow());
    const [name, value, range, likely] = row.cells;
    say(name, dimension.name);
    say(value, number(dimension.value));
    drawBar(range, dimension);
    likely.hidden = !hasLikely;
    const best = [...dimension.alternatives].sort((a, b) => b[1] - a[1]).slice(0, 3);
    say(likely, best.map(([x, p]) => `${number(x)}\u00a0(${percent(p)})`).join(', '));
  });
}

function dimensionRow() {
  const bar = shape('svg', { class: 'bar', viewBox: '0 0 200 28', preserveAspectRatio: 'none', 'aria-hidden': 'true' });
  const ends = element('div', { className: 'ends' }, element('span'), element('span'));
  return element('tr', {},
    element('th', { scope: 'row' }), element('td'), element('td', { className: 'range' }, bar, ends),
    element('td', { className: 'likely' }));
}

/** The value from zero, or the low end, and the probabilities of all values above it. */
function drawBar(cell, { value, low, high, alternatives }) {
  const [bar, ends] = cell.children;
  const hasWidth = high !== low;
  const at = (x) => (hasWidth ? Math.min(199, Math.max(1, 200 * (x - low) / (high - low))) : 100);
  const zero = at(Math.min(Math.max(0, Math.min(low, high)), Math.max(low, high)));
  const x = at(value);
  bar.replaceChildren(
    shape('rect', { class: 'zero', x: zero - 0.5, y: 0, width: 1, height: 28 }),
    shape('rect', { class: 'value', x: Math.min(zero, x), y: 10, width: Math.abs(x - zero), height: 18 }),
    ...alternatives.map(([of, p]) => shape('rect', { class: 'chance', x: at(of) - 0.6, y: 28 - 26 * p, width: 1.2, height: 26 * p })),
    shape('rect', { class: 'mark', x: x - 1, y: 0, width: 2, height: 6 }));
  say(ends.firstChild, number(low));
  say(ends.lastChild, number(high));
}

function drawTimes(card, samples) {
  if (samples.length === 0) return;
  const total = (times) => STAGES.reduce((sum, stage) => sum + times[stage], 0);
  const most = Math.max(...samples.map(total), 1e-3);
  const width = 300 / SAMPLES;
  const bars = samples.flatMap((times, i) => {
    let y = 90;
    return STAGES.map((stage) => {
      const height = 86 * times[stage] / most;
      y -= height;
      return shape('rect', { class: stage, x: (SAMPLES - samples.length + i) * width, y, width: width * 0.85, height });
    });
  });
  card.querySelector('.chart').replaceChildren(...bars);
  say(card.querySelector('.scale'), `${samples.length} step${samples.length > 1 ? 's' : ''}, the longest of ${duration(most)} ms`);
  const body = card.querySelector('.stages tbody');
  const rows = [...STAGES, 'step'];
  rows.forEach((stage, i) => {
    if (!body.rows[i]) {
      const swatch = shape('svg', { class: `swatch ${stage}`, viewBox: '0 0 1 1', 'aria-hidden': 'true' });
      if (stage !== 'step') swatch.append(shape('rect', { width: 1, height: 1 }));
      body.append(element('tr', {}, element('th', { scope: 'row' }, swatch, stage === 'step' ? 'whole step' : stage), element('td'), element('td')));
    }
    const sorted = samples.map((times) => times[stage]).sort((a, b) => a - b);
    say(body.rows[i].cells[1], duration(samples.at(-1)[stage]));
    say(body.rows[i].cells[2], duration(sorted[Math.floor(sorted.length / 2)]));
  });
}

/** Makes the form that the model needs. */
async function describe() {
  const response = await ask('/v1/model');
  if (!response.ok) return;
  model = await response.json();
  const keys = model.unnorm_keys.map((key) => element('option', { value: key, textContent: key }));
  $('key').replaceChildren(...keys);
  if (model.unnorm_key) $('key').value = model.unnorm_key;
  $('key-field').hidden = keys.length < 2;
  const wrists = (model.cameras ?? []).slice(1).flatMap((camera) => [
    element('label', { htmlFor: camera, textContent: camera }),
    element('input', { id: camera, name: 'wrist', type: 'file', accept: 'image/*', required: true }),
  ]);
  $('wrists').replaceChildren(...wrists);
  $('state-field').hidden = !model.state_length;
  $('arm').required = Boolean(model.state_length);
  say($('n-state'), String(model.state_length ?? ''));
}

async function act(event) {
  event.preventDefault();
  const form = new FormData($('try-form'));
  if (!model?.state_length) form.delete('state');
  else form.set('state', `[${form.get('state').replace(/[[\]]/g, '').trim().split(/[\s,]+/).join(', ')}]`);
  if (!form.get('unnorm_key')) form.delete('unnorm_key');
  $('act').disabled = true;
  say($('answer'), 'The model is looking …');
  try {
    const response = await ask('/v1/act', { method: 'POST', body: form, headers: { 'X-Client-Id': 'page' } });
    if (!response.ok) {
      $('answer').replaceChildren(element('p', { className: 'error', textContent: await errorOf(response) }));
    } else {
      const { action, unnorm_key, timing_ms } = await response.json();
      const n = action.length;
      const names = n === 7 ? ['dx', 'dy', 'dz', 'droll', 'dpitch', 'dyaw', 'gripper'] : action.map((_, i) => `action[${i}]`);
      const said = action.map((x, i) => `${names[i]} ${number(x)}`).join(', ');
      $('answer').replaceChildren(
        element('p', { textContent: said }),
        element('p', { className: 'when', textContent: `In units of ${unnorm_key}, ${duration(timing_ms.step)} ms. The picture is above, under “page”.` }));
    }
  } catch {
    $('answer').replaceChildren(element('p', { className: 'error', textContent: 'The server did not answer.' }));
  }
  $('act').disabled = false;
}

$('token-form').addEventListener('submit', (event) => {
  event.preventDefault();
  token = $('token').value.trim();
  $('token').value = '';
  say($('token-error'), '');
  start();
});
$('forget').addEventListener('click', () => {
  sessionStorage.removeItem('token');
  location.reload();
});
$('try-form').addEventListener('submit', act);
document.addEventListener('visibilitychange', () => (document.hidden ? stop() : start()));
start();
