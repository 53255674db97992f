// The page in a browser: see `tests/page`, which calls this.

import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { chromium } from 'playwright-core';

const [executablePath, profile, pictures, open, closed, token, oft] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const table = readFileSync('example/tabletop.png');
const wrist = readFileSync('example/tabletop-wrist.png');
const PATIENCE = 60_000;

const context = await chromium.launchPersistentContext(profile, {
  executablePath,
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  viewport: { width: 1280, height: 900 },
  timeout: 3 * PATIENCE,
});
context.setDefaultTimeout(PATIENCE);

// Whatever a page says in its console, and whatever it asks of others.
const said = [];
const outside = [];
context.on('request', (request) => {
  const url = request.url();
  if (![open, closed, oft].some((server) => url.startsWith(`${server}/`)) && !url.startsWith('data:')) outside.push(url);
});
const allowed = [];
function watch(page) {
  page.on('console', (message) => {
    const known = allowed.some((part) => message.text().includes(part));
    if (['error', 'warning'].includes(message.type()) && !known) said.push(message.text());
  });
  page.on('pageerror', (error) => said.push(String(error)));
  return page;
}

/** A robot's step. */
async function step(server, name, instruction, picture = table) {
  const form = new FormData();
  form.set('image', new Blob([picture]), 'x.png');
  form.set('instruction', instruction);
  if (server === oft) {
    form.set('wrist', new Blob([wrist]), 'w.png');
    form.set('state', readFileSync('example/tabletop-state.json', 'utf8'));
  }
  const headers = { Authorization: `Bearer ${token}`, 'X-Client-Id': name };
  const response = await fetch(`${server}/v1/act`, { method: 'POST', body: form, headers });
  assert.equal(response.status, 200, await response.clone().text());
  return response.json();
}

async function accessible(page, what) {
  // As a tool of the browser's, to which the page's policy does not apply.
  const tool = await context.newCDPSession(page);
  await tool.send('Runtime.evaluate', { expression: axe });
  await tool.detach();
  const { violations } = await page.evaluate(() => axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice'] }));
  const found = violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.target).join(' ')}`);
  assert.deepEqual(found, [], what);
}

const card = (page, name) => page.locator('article', { has: page.getByRole('heading', { name, exact: true }) });

async function robotsAppear(page) {
  await page.goto(`${open}/`);
  await page.getByText('No robot has asked for a motion yet.').waitFor();
  assert.equal(await page.locator('#state').textContent(), 'live');
  await page.locator('#model:not(:empty)').waitFor();
  const answer = await step(open, 'left arm', 'put eggplant into pot');
  const left = card(page, 'left arm');
  await left.getByText('put eggplant into pot').waitFor();
  const rows = left.locator('.motion tbody tr');
  assert.equal(await rows.count(), 7);
  for (const [i, name] of ['dx', 'dy', 'dz', 'droll', 'dpitch', 'dyaw', 'gripper'].entries()) {
    const [said, value] = await rows.nth(i).locator('th, td').allTextContents();
    assert.deepEqual([said, value], [name, answer.action[i].toFixed(4).replace(/^-(0\.0+)$/, '$1')]);
  }
  assert.match(await rows.nth(0).locator('.likely').textContent(), /^-?0\.\d{4}\s\((> 99|\d+)\s%\)/);
  const seen = await left.locator('img').evaluate(async (image) => {
    await image.decode();
    return [image.naturalWidth, image.naturalHeight];
  });
  const { image_size: side } = await (await fetch(`${open}/v1/model`)).json();
  assert.deepEqual(seen, [side, side], 'as the model sees it');
  // A robot's name and instruction are text, whatever they look like.
  await step(open, '<img src=x onerror=alert(1)>', '<script>alert(1)</script>');
  await card(page, '<img src=x onerror=alert(1)>').getByText('<script>alert(1)</script>').waitFor();
  await step(open, 'dark arm', 'put carrot into pot', readFileSync(`${profile}/dark.png`));
  await card(page, 'dark arm').getByText('too dark').waitFor();
  for (let i = 0; i < 40; i += 1) {
    await step(open, 'left arm', 'put eggplant into pot');
    await new Promise((done) => setTimeout(done, 100));
  }
  await left.getByText('pixel by pixel').waitFor();
  assert.ok(await left.locator('.chart rect').count() >= 6 * 10, 'the chart runs');
  assert.match(await left.locator('.when').textContent(), /steps a second/);
}

async function theFormWorks(page) {
  await page.setInputFiles('#image', 'example/tabletop.png');
  await page.fill('#instruction', 'put carrot into pot');
  await page.press('#instruction', 'Enter');
  await page.locator('#answer').getByText('dx ').waitFor();
  await card(page, 'page').getByText('put carrot into pot').waitFor();
  await page.setInputFiles('#image', 'Cargo.toml');
  allowed.push('422');
  await page.click('#act');
  await page.locator('#answer .error').getByText('the image cannot be used').waitFor();
}

/** Everything that can be used is reached with Tab, in the order of the page, and shows that it is. */
async function keyboardReaches(page) {
  await page.reload();
  await card(page, 'page').waitFor();
  const wanted = await page.locator('a[href], button, input, select, summary').evaluateAll((all) => all
    .filter((one) => one.checkVisibility() && !one.disabled).map((one) => one.id || one.className));
  const reached = [];
  for (let i = 0; i < wanted.length + 5; i += 1) {
    await page.keyboard.press('Tab');
    const { name, outline } = await page.evaluate(() => {
      const one = document.activeElement;
      return { name: one.id || one.className, outline: getComputedStyle(one).outlineStyle };
    });
    if (wanted.includes(name) && !reached.includes(name)) {
      reached.push(name);
      assert.notEqual(outline, 'none', `${name} shows the focus`);
    }
  }
  assert.deepEqual(reached, wanted);
}

async function pictureOf(page, name) {
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme });
    for (const [size, width] of [['wide', 1280], ['tablet', 800], ['phone', 375]]) {
      await page.setViewportSize({ width, height: 900 });
      const overflows = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
      assert.ok(!overflows, `${name} is wider than a ${size}`);
      await page.screenshot({ path: `${pictures}/${name}-${colorScheme}-${size}.png`, fullPage: true });
    }
    await accessible(page, `${name}, ${colorScheme}`);
  }
  await page.setViewportSize({ width: 1280, height: 900 });
}

async function tokensHold(page) {
  allowed.push('401');
  await page.goto(`${closed}/`);
  await page.getByText('waiting for the token').waitFor();
  assert.ok(await page.locator('#robots, #try').evaluateAll((all) => all.every((one) => !one.checkVisibility())));
  await pictureOf(page, 'token');
  await page.fill('#token', 'wrong-token-of-someone');
  await page.press('#token', 'Enter');
  await page.getByText('not the server’s token').waitFor();
  await page.fill('#token', token);
  await page.press('#token', 'Enter');
  await page.getByText('No robot has asked for a motion yet.').waitFor();
  await step(closed, 'arm', 'put carrot into pot');
  await card(page, 'arm').waitFor();
  await page.reload();
  await card(page, 'arm').waitFor();
  assert.ok(!page.url().includes(token));
  assert.equal(await page.evaluate(() => localStorage.length + document.cookie.length), 0, 'kept in the tab alone');
  await page.click('#forget');
  await page.getByText('waiting for the token').waitFor();
  assert.equal(await page.evaluate(() => sessionStorage.length), 0);
}

async function chunksAppear(page) {
  await page.goto(`${oft}/`);
  await page.locator('#wrists input').waitFor();
  await page.setInputFiles('#image', 'example/tabletop.png');
  await page.setInputFiles('#wrists input', 'example/tabletop-wrist.png');
  await page.fill('#arm', readFileSync('example/tabletop-state.json', 'utf8').trim());
  await page.fill('#instruction', 'put carrot into pot');
  await page.click('#act');
  await page.locator('#answer').getByText('dx ').waitFor();
  const shown = card(page, 'page');
  await shown.getByText('The first of 8 actions').waitFor();
  assert.equal(await shown.locator('img').count(), 2);
  await pictureOf(page, 'chunk');
}

try {
  const canvas = watch(await context.newPage());
  // A dark picture, made by the browser.
  const dark = await canvas.evaluate(() => {
    const made = Object.assign(document.createElement('canvas'), { width: 64, height: 64 });
    made.getContext('2d').fillRect(0, 0, 64, 64);
    return made.toDataURL('image/png').split(',')[1];
  });
  writeFileSync(`${profile}/dark.png`, Buffer.from(dark, 'base64'));
  await canvas.close();

  const page = watch(await context.newPage());
  await robotsAppear(page);
  await theFormWorks(page);
  await keyboardReaches(page);
  await pictureOf(page, 'robots');
  await tokensHold(page);
  await chunksAppear(page);
  assert.deepEqual(said, [], 'the console');
  assert.deepEqual(outside, [], 'requests to others');
  console.log(`the page works; its pictures are in ${pictures}`);
} finally {
  await context.close();
}
